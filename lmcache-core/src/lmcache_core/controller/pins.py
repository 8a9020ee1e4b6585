"""Pins: kept until their time is over, also by the next process of an instance."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence

import msgspec
from msgspec.structs import replace

from lmcache_core.agent import wire
from lmcache_core.controller import messages
from lmcache_core.controller.config import ControllerConfig
from lmcache_core.controller.documents import Documents, StoreDown
from lmcache_core.controller.jobs import Jobs, Step
from lmcache_core.controller.plans import part_of
from lmcache_core.controller.problem import Refusal, not_found
from lmcache_core.controller.records import JobRecord, PinRecord
from lmcache_core.controller.registry import Record

MAX_DUE = 32
_AGAIN_S = 2.0
_ORDER = msgspec.msgpack.Decoder(wire.Pin)


class Pins:
    """Belongs to one event loop.  What is async raises `StoreDown` unless it says otherwise."""

    def __init__(
        self,
        config: ControllerConfig,
        documents: Documents,
        jobs: Jobs,
        *,
        now_s: Callable[[], float],
        wall_s: Callable[[], float],
    ) -> None:
        self._config = config
        self._documents = documents
        self._jobs = jobs
        self._now_s, self._wall_s = now_s, wall_s
        self._untold: dict[str, set[str]] = {}
        self._process: dict[str, str] = {}
        documents.listen(self._heard)

    def all(self) -> list[PinRecord]:
        """Those that hold, by end."""
        now_s = self._wall_s()
        pins: list[PinRecord] = list(self._documents.all("pin").values())
        return sorted((p for p in pins if p.until_s > now_s), key=lambda p: (p.until_s, p.id))

    async def create(self, pin: PinRecord, order: wire.Pin, instances: Sequence[str]) -> PinRecord:
        """A pin and its job, or those that have these ids already.

        Raises:
            Refusal: a limit is reached.
        """
        there: PinRecord | None = await self._documents.load("pin", pin.id)
        if there is None:
            self._check_limits(pin)
            self._jobs.check_room(len(instances))  # before anything is made
            ttl_s = pin.until_s - self._wall_s()
            key = secrets.token_hex(12)
            body = msgspec.msgpack.encode(order)
            await self._documents.put_bytes("order", key, body, ttl_s=ttl_s + 60)
            # Before its job: a pin without one is seen, carried out and can be ended.
            await self._documents.create("pin", pin.id, replace(pin, order=key), ttl_s=ttl_s)
            there = await self._documents.load("pin", pin.id) or pin
        steps = [Step(instance=name, order=order) for name in there.instances]
        await self._jobs.create("pin", steps, id=there.job, pin=there.id)
        return there

    async def end(self, id: str) -> JobRecord:
        """End a pin everywhere; the job that does it.

        Raises:
            Refusal: there is no such pin.
        """
        pin: PinRecord | None = await self._documents.load("pin", id)
        if pin is None:
            raise not_found("pin", id)
        job_id = "job-" + hashlib.sha256(f"unpin {id}".encode()).hexdigest()[:20]
        pinning = self._jobs.live.get(pin.job)
        if pinning is not None:
            await self._jobs.cancel(pinning.id)
        steps = [Step(instance=name, order=wire.Unpin(id="new", pin=id)) for name in pin.instances]
        job = await self._jobs.create("unpin", steps, id=job_id, pin=id)
        # After its job: until then it is seen, and ending it again comes here again.
        await self._documents.remove("pin", id)
        return job

    async def due(self, record: Record) -> list[wire.Order]:
        """Pins that this process of the instance has not had."""
        name, incarnation = record.name, record.incarnation
        if self._process.get(name) != incarnation:
            pins = self._documents.all("pin")
            self._untold[name] = {id for id, pin in pins.items() if name in pin.instances}
            self._process[name] = incarnation
        untold = self._untold.setdefault(name, set())
        found: list[wire.Order] = []
        now_s = self._now_s()
        for id in sorted(untold):
            pin: PinRecord | None = self._documents.find("pin", id)
            if pin is None or pin.told.get(name) == incarnation or pin.until_s <= self._wall_s():
                untold.discard(id)
                continue
            order_id = _renewal(id, incarnation)
            again_s = record.told.get(order_id, float("-inf")) + _AGAIN_S
            if pin.job in self._jobs.live or now_s < again_s:
                continue
            record.told[order_id] = now_s
            body = await self._documents.get_bytes("order", pin.order)
            if body is not None:
                found.append(replace(_ORDER.decode(body), id=order_id))
            if len(found) >= MAX_DUE:
                break
        return found

    async def heard(self, record: Record, said: Sequence[wire.Progress]) -> list[str]:
        """Note which pins an instance has carried out; ids of orders that need not be told again.
        Never raises `StoreDown`."""
        recorded = []
        for progress in said:
            if progress.state == "running":
                continue
            id, renewal, _ = progress.id.rpartition(":")
            if not renewal:
                place = part_of(progress.id)
                job: JobRecord | None = self._documents.find("job", place[0]) if place else None
                if job is None or job.kind != "pin":
                    continue
                id = job.pin
            try:
                await self._carried_out(id, record)
            except StoreDown:
                continue
            if renewal:
                recorded.append(progress.id)
                record.told.pop(progress.id, None)
        return recorded

    async def _carried_out(self, id: str, record: Record) -> None:
        """This process of the instance has had the pin's order."""
        if self._documents.find("pin", id) is None:
            return
        name, incarnation = record.name, record.incarnation
        await self._documents.change(
            "pin",
            id,
            lambda pin: replace(pin, told={**pin.told, name: incarnation}),
            ttl_s=lambda pin: max(1.0, pin.until_s - self._wall_s()),
        )

    async def settle(self) -> None:
        """What follows from jobs: pins that one ends are no more."""
        for job in list(self._jobs.live.values()):
            if job.kind == "unpin" and self._documents.find("pin", job.pin) is not None:
                await self._documents.remove("pin", job.pin)

    def _check_limits(self, pin: PinRecord) -> None:
        most = self._config.max_pins
        if self._documents.number("pin") >= most and len(self.all()) >= most:
            raise Refusal(
                409,
                "too_many_pins",
                f"there are {most} pins already",
                hint="end some, or raise --max-pins",
            )
        most = self._config.max_pinned_bytes_per_owner
        if not most:
            return
        taken = sum(other.nbytes for other in self.all() if other.owner == pin.owner)
        if taken + pin.nbytes > most:
            raise Refusal(
                409,
                "quota",
                f"owner {pin.owner!r} has pinned {taken} bytes, and may {most}",
                hint="end some of its pins, or raise --max-pinned-bytes-per-owner",
            )

    def _heard(self, kind: str, id: str) -> None:
        if kind != "pin":
            return
        pin: PinRecord | None = self._documents.find("pin", id)
        for name in pin.instances if pin is not None else ():
            self._untold.setdefault(name, set()).add(id)


def shown(pin: PinRecord) -> messages.Pin:
    """As the API has it."""
    return messages.Pin(
        id=pin.id,
        owner=pin.owner,
        instances=list(pin.instances),
        tier=pin.tier,
        model=pin.model,
        chunks=pin.chunks,
        made_s=pin.made_s,
        until_s=pin.until_s,
        job=pin.job,
    )


def _renewal(pin: str, incarnation: str) -> str:
    return f"{pin}:{hashlib.sha256(incarnation.encode()).hexdigest()[:16]}"
