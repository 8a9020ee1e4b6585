"""What each operation does."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

import msgspec

from lmcache_core.agent import wire
from lmcache_core.controller import messages, pins, plans, quotas, views
from lmcache_core.controller.core import Controller
from lmcache_core.controller.jobs import Step
from lmcache_core.controller.messages import JobKind
from lmcache_core.controller.metrics import CONTENT_TYPE as METRICS_TYPE
from lmcache_core.controller.metrics import Latency, metrics_text
from lmcache_core.controller.operations import Answer, Call
from lmcache_core.controller.problem import Refusal, not_found
from lmcache_core.controller.records import PinRecord
from lmcache_core.controller.selection import Chosen, choose

_MAX_EXPLAINED = 64


class Api:
    """Handlers; `lmcache_core.controller.table` says when each is called.

    Args:
        document: of OpenAPI, encoded.
    """

    def __init__(self, controller: Controller, latency: Latency, document: bytes) -> None:
        self._controller = controller
        self._latency = latency
        self._document = document

    async def alive(self, call: Call) -> Answer:
        return Answer(body={"status": "ok"})

    async def openapi(self, call: Call) -> Answer:
        return Answer(body=self._document)

    async def metrics(self, call: Call) -> Answer:
        return Answer(body=metrics_text(self._controller, self._latency), media_type=METRICS_TYPE)

    async def health(self, call: Call) -> Answer:
        known = self._controller
        problems = views.problems(known.registry, known.documents.down, known.names.lack)
        others = {lease.name for lease in known.documents.all("controller").values()}
        return Answer(
            body=messages.HealthReply(
                status="degraded" if problems else "ok",
                version=version(),
                uptime_s=known.now_s() - known.started_s,
                state=known.documents.state.address,
                instances=len(known.registry.records),
                chunks=len(known.directory),
                problems=problems,
                controllers=sorted(others | {known.id}),
            )
        )

    async def instances(self, call: Call) -> Answer:
        registry, now_s = self._controller.registry, self._controller.now_s()
        rows = [views.instance(r, registry, now_s) for _, r in sorted(registry.records.items())]
        return Answer(body=messages.Instances(instances=rows))

    async def instance(self, call: Call) -> Answer:
        registry, now_s = self._controller.registry, self._controller.now_s()
        return Answer(body=views.instance(registry.named(call.path["name"]), registry, now_s))

    async def lookup(self, call: Call) -> Answer:
        select = call.body.select
        if select.tokens is None and select.text is None and select.keys is None:
            raise Refusal(422, "bad_selection", "a lookup is of tokens, text or keys")
        chosen = await self._choose(select)
        return Answer(body=views.lookup(chosen, self._controller.registry))

    async def usage(self, call: Call) -> Answer:
        known = self._controller
        instance, tier = call.query["instance"], call.query["tier"]
        if instance:
            known.registry.named(instance)
        found = views.usage(known.registry, known.names, instance=instance, tier=tier)
        return Answer(body=found)

    async def misses(self, call: Call) -> Answer:
        registry, id = self._controller.registry, call.path["request_id"]
        if len(id) > 256:
            raise not_found("request", id)
        if call.query["instance"]:
            asked = [registry.named(call.query["instance"])]
        else:
            asked = [record for record in registry.live() if record.kind != "node"]
        found = None
        for start in range(0, len(asked), _MAX_EXPLAINED):
            part = asked[start : start + _MAX_EXPLAINED]
            found = found or await self._controller.questions.explain(part, id)
        if found is None:
            raise not_found("request", id, hint="instances remember the latest only")
        rows = [
            messages.Miss(
                index=row.index,
                key=row.key.hex(),
                reason=row.reason,
                detail=row.detail,
                at_s=row.at_s or None,
            )
            for row in found[1]
        ]
        return Answer(body=messages.Misses(request_id=id, instance=found[0], misses=rows))

    async def prefixes(self, call: Call) -> Answer:
        known = self._controller
        found = views.prefixes(known.registry.live(), known.names, call.query["limit"])
        return Answer(body=found)

    async def history(self, call: Call) -> Answer:
        return Answer(body=self._controller.history.shown())

    async def clear(self, call: Call) -> Answer:
        asked: messages.ClearRequest = call.body
        chosen = await self._choose(asked.select)
        steps = self._controller.actions.clear(chosen, instances=asked.instances, tiers=asked.tiers)
        return await self._make(call, "clear", steps)

    async def move(self, call: Call) -> Answer:
        return await self._copy(call, move=True)

    async def copy(self, call: Call) -> Answer:
        return await self._copy(call, move=False)

    async def compress(self, call: Call) -> Answer:
        if not call.body.codec:
            raise Refusal(422, "no_codec", "name a codec", hint="such as zstd or cachegen")
        return await self._recode(call, "compress")

    async def decompress(self, call: Call) -> Answer:
        if call.body.codec or call.body.level:
            raise Refusal(422, "bad_codec", "decompress has no codec and no level")
        return await self._recode(call, "decompress")

    async def pins(self, call: Call) -> Answer:
        return Answer(body=messages.Pins(pins=[pins.shown(p) for p in self._controller.pins.all()]))

    async def pin(self, call: Call) -> Answer:
        asked: messages.PinRequest = call.body
        chosen = await self._choose(asked.select)
        id, now_s = call.new_id("pin"), self._controller.wall_s()
        until_s = now_s + asked.ttl_s
        order, instances, nbytes = self._controller.actions.pin(
            chosen, pin=id, tier=asked.tier, until_s=until_s, instances=asked.instances
        )
        record = PinRecord(
            id=id,
            owner=asked.owner,
            instances=tuple(instances),
            tier=asked.tier,
            model=chosen.model.name if chosen.model is not None else "",
            chunks=len(chosen.prefix),
            nbytes=nbytes * len(instances),
            made_s=now_s,
            until_s=until_s,
            job=call.new_id("job"),
            order="",
        )
        made = await self._controller.pins.create(record, order, instances)
        return Answer(body=pins.shown(made), status=201)

    async def unpin(self, call: Call) -> Answer:
        job = await self._controller.pins.end(call.path["id"])
        return Answer(body=plans.shown(job), status=202)

    async def jobs(self, call: Call) -> Answer:
        state, limit = call.query["state"], call.query["limit"]
        found = [job for job in self._controller.jobs.all() if state in ("", plans.state_of(job))]
        return Answer(body=messages.Jobs(jobs=[plans.shown(job) for job in found[:limit]]))

    async def job(self, call: Call) -> Answer:
        id, wait_s = call.path["id"], call.query["wait_s"]
        if self._controller.stopping:
            wait_s = 0.0
        return Answer(body=plans.shown(await self._controller.jobs.wait(id, wait_s)))

    async def cancel(self, call: Call) -> Answer:
        return Answer(body=plans.shown(await self._controller.jobs.cancel(call.path["id"])))

    async def quotas(self, call: Call) -> Answer:
        found = [quotas.shown(quota) for quota in self._controller.quotas.all()]
        return Answer(body=messages.Quotas(quotas=found))

    async def put_quota(self, call: Call) -> Answer:
        quota = await self._controller.quotas.put(call.body)
        self._controller.registry.wake_all()
        return Answer(body=quotas.shown(quota))

    async def delete_quota(self, call: Call) -> Answer:
        await self._controller.quotas.delete(call.path["id"])
        self._controller.registry.wake_all()
        return Answer(status=204)

    async def sync(self, call: Call) -> Answer:
        reply = await self._controller.sync(call.body, gone=call.gone)
        return Answer(body=msgspec.msgpack.encode(reply), media_type=wire.CONTENT_TYPE)

    async def where(self, call: Call) -> Answer:
        reply = self._controller.where(call.body)
        return Answer(body=msgspec.msgpack.encode(reply), media_type=wire.CONTENT_TYPE)

    async def _choose(self, select: messages.Selection) -> Chosen:
        known = self._controller
        return await choose(
            select, names=known.names, registry=known.registry, questions=known.questions
        )

    async def _copy(self, call: Call, *, move: bool) -> Answer:
        asked: messages.MoveRequest = call.body
        chosen = await self._choose(asked.select)
        steps = await self._controller.actions.copy(chosen, asked.source, asked.target, move=move)
        return await self._make(call, "move" if move else "copy", steps)

    async def _recode(self, call: Call, kind: JobKind) -> Answer:
        asked: messages.RecodeRequest = call.body
        chosen = await self._choose(asked.select)
        steps = self._controller.actions.recode(
            chosen,
            tier=asked.tier,
            instances=asked.instances,
            codec=asked.codec,
            level=asked.level,
        )
        return await self._make(call, kind, steps)

    async def _make(self, call: Call, kind: JobKind, steps: Sequence[Step]) -> Answer:
        job = await self._controller.jobs.create(kind, steps, id=call.new_id("job"))
        return Answer(body=plans.shown(job), status=202)


def version() -> str:
    """Of lmcache-core."""
    return metadata.version("lmcache-core")
