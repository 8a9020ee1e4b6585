"""A controller's HTTP API with canned, changing data, built from the types of
`lmcache_core.controller.messages` so that it can't drift from them.

``python lmcache-core/tests/web/stub.py`` serves it, to look at the page while working on it.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import lmcache_core.controller as controller
from lmcache_core.controller import messages as api

TOKEN = "stub-token"
WEB = Path(controller.__file__).parent / "web"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
GIB = 1 << 30
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
OTHER_MODEL = "Qwen/Qwen2.5-14B-Instruct"
TENANTS = ("", "3f2a9c01d4e5b678", "9b71d0aa42c3fe15")
ORDERS: dict[str, type] = {
    "clear": api.ClearRequest, "move": api.MoveRequest, "copy": api.MoveRequest,
    "compress": api.RecodeRequest, "decompress": api.RecodeRequest,
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A request as the stub got it."""

    method: str
    path: str
    query: str
    body: Any
    key: str | None


def chunk_key(number: int) -> str:
    """A stored key in hex."""
    return hashlib.sha512(str(number).encode()).hexdigest()[:92]


def tier(name: str, used: float, capacity: float, pinned: float = 0, **more: Any) -> api.Tier:
    """One tier; sizes in GiB."""
    url = {"host": "", "disk": "file:///nvme/kv", "remote": "redis://cache:6379"}.get(name, "")
    return api.Tier(
        name=name, url=url, used_bytes=int(used * GIB), capacity_bytes=int(capacity * GIB),
        pinned_bytes=int(pinned * GIB), chunks=int(used * 31), available=more.get("ok", True),
        reason=more.get("reason", ""), writable=more.get("writable", True),
    )  # fmt: skip


def instance(name: str, number: int = 0, **more: Any) -> api.Instance:
    """An instance with three tiers and some traffic."""
    asked = 21_000.0 + 4_700 * math.sin(number * 1.7)
    rates = api.Rates(
        requested_tokens=asked, hit_tokens=asked * (0.55 + 0.06 * (number % 6)),
        stored_tokens=asked * 0.31, read_bytes=3.1e8 + 4e7 * (number % 5),
        write_bytes=1.2e8 + 2e7 * (number % 4),
    )  # fmt: skip
    fields: dict[str, Any] = {
        "kind": "embedded", "state": "live", "incarnation": f"{name}-1a2b",
        "version": "0.9.0", "backends": {"lmcache-backend-redis": "0.9.0"}, "pid": 4000 + number,
        "uptime_s": 86_400.0 * 3 + 977 * number, "seen_s": time.time() - 0.4, "models": [MODEL],
        "channel": f"tcp://10.0.0.{number + 10}:7001", "node": "", "workers": [], "rates": rates,
        "tiers": [
            tier("host", 19.7 + 0.05 * number, 20, 2.2 + 0.7 * (number % 3)),
            tier("disk", 118 + 11 * (number % 7), 200, 8),
            tier("remote", 840, 0),
        ],
    }  # fmt: skip
    return api.Instance(name=name, **{**fields, **more})


def fleet() -> list[api.Instance]:
    """A small fleet with one of everything that can be seen."""
    broken = [tier("host", 20, 20, 1), tier("disk", 61, 200),
              tier("remote", 840, 0, ok=False, reason="3 timeouts in 10 s")]  # fmt: skip
    read_only = [tier("host", 61.2, 64, 11.5), tier("disk", 900, 2000), tier("remote", 840, 0,
                 writable=False)]  # fmt: skip
    engine = {"kind": "engine", "tiers": [], "node": "node-a", "models": [OTHER_MODEL]}
    return [
        instance("llama-0", 0), instance("llama-1", 1),
        instance("llama-2", 2, tiers=broken,
                 errors={"remote.get.timeout": 41, "remote.corrupt": 1}),
        instance("llama-3", 3, state="lost", rates=api.Rates(), seen_s=time.time() - 412),
        instance("node-a", 4, kind="node", tiers=read_only, workers=["qwen-0", "qwen-1"],
                 models=[OTHER_MODEL], errors={"node.refused_client": 3}),
        instance("qwen-0", 5, **engine), instance("qwen-1", 6, state="resyncing", **engine),
    ]  # fmt: skip


def job(number: int, kind: str, state: str, **more: Any) -> api.Job:
    """A job with one part."""
    total = more.pop("total", 640)
    settled = more.pop("settled", total if state == "done" else total // 3)
    where = more.pop("instance", "llama-1")
    age_s = more.pop("age_s", 40.0 + 211 * number)
    made_s = time.time() - age_s
    part = api.Part(number=0, instance=where, op=kind, state=state, total=total, settled=settled,
                    bytes=settled << 23, errors=more.get("errors", {}))  # fmt: skip
    ended = None if state == "running" else made_s + 3.5 + number % 9
    name = hashlib.sha256(f"job {number}".encode()).hexdigest()[:24]
    return api.Job(id=name, kind=kind, state=state, made_s=made_s, ended_s=ended, total=total,
                   settled=settled, bytes=settled << 23, parts=[part], **more)  # fmt: skip


def jobs() -> list[api.Job]:
    """Some of every state."""
    return [
        job(1, "copy", "running", settled=411), job(2, "compress", "running", total=5200),
        job(3, "clear", "done", total=1204),
        job(4, "move", "failed", errors={"no_room": 12}, error="llama-3 was lost"),
        job(5, "pin", "done", total=96, pin="pin-1"), job(6, "copy", "cancelled"),
    ]  # fmt: skip


def history(points: int = 360, interval_s: float = 10.0) -> api.History:
    """The last hour: a quiet start, a wave, and an interval without requests."""
    now_s, samples = time.time(), []
    for at in range(points):
        wave = math.sin(at / 41) + 0.35 * math.sin(at / 7) + 0.12 * math.sin(at * 2.1)
        asked = 90_000 + 31_000 * wave
        rate = 0.58 + 0.16 * math.sin(at / 60) + 0.03 * math.sin(at / 3)
        quiet = 120 <= at < 126
        samples.append(api.Sample(
            at_s=now_s - (points - 1 - at) * interval_s, hit_rate=None if quiet else rate,
            requested_tokens=0 if quiet else asked, hit_tokens=0 if quiet else asked * rate,
            stored_tokens=0 if quiet else asked * 0.3,
            read_bytes=0 if quiet else 1.1e9 + 3e8 * wave, write_bytes=0 if quiet else 5e8,
        ))  # fmt: skip
    return api.History(interval_s=interval_s, samples=samples)


def usage(names: list[str]) -> list[api.Usage]:
    """What each tenant takes, by model, of host and disk."""
    rows = []
    for at, name in enumerate(names):
        model = OTHER_MODEL if name.startswith(("node", "qwen")) else MODEL
        for number, tenant in enumerate(TENANTS):
            for where, size in (("host", 4.5), ("disk", 33.0)):
                nbytes = int(size * GIB * (1 - 0.27 * number) * (1 + 0.02 * at))
                rows.append(api.Usage(
                    instance=name, tier=where, model=model, tenant_id=tenant, lora="",
                    tag="00" * 8, chunks=nbytes >> 23, bytes=nbytes,
                ))  # fmt: skip
    return rows


@dataclass
class World:
    """What the stub tells, and what it was asked.

    Attributes:
        mode: ``up``; ``away`` (connections break); ``gateway`` (502 of somebody in between).
        broken: path -> status of requests that fail.
        hold: where set, writing requests wait for it.
    """

    token: str = TOKEN
    mode: str = "up"
    instances: list[api.Instance] = field(default_factory=fleet)
    jobs: list[api.Job] = field(default_factory=jobs)
    pins: list[api.Pin] = field(default_factory=list)
    quotas: list[api.Quota] = field(default_factory=list)
    history: api.History = field(default_factory=history)
    prefixes: list[api.Prefix] = field(default_factory=list)
    problems: list[str] = field(default_factory=lambda: [
        "llama-3 has not spoken for 412 s", "remote of llama-2: breaker open: 3 timeouts in 10 s",
    ])  # fmt: skip
    broken: dict[str, int] = field(default_factory=dict)
    hold: asyncio.Event | None = None
    calls: list[Call] = field(default_factory=list)
    known: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        now_s = time.time()
        self.pins = self.pins or [
            api.Pin(id=f"pin-{at}", owner=owner, instances=["llama-0", "llama-1"][: at + 1],
                    tier="host", model=MODEL, chunks=96 >> at, made_s=now_s - 4000,
                    until_s=now_s + 5000 * (at + 1), job=self.jobs[0].id if self.jobs else "")
            for at, owner in enumerate(("ops", "search-team"))
        ]  # fmt: skip
        self.quotas = self.quotas or [
            api.Quota(id="q-1", tenant_id=TENANTS[1], tier="host", bytes=4 * GIB),
            api.Quota(id="q-2", tenant_id=TENANTS[2], tier="*", bytes=40 * GIB),
        ]
        self.prefixes = self.prefixes or [
            api.Prefix(instance=f"llama-{at % 3}", model=MODEL, tenant_id=TENANTS[at % 3],
                       key=chunk_key(at), chunks=40 - 3 * at, requests=9100 // (at + 1),
                       saved_tokens=41_300_000 // (at + 1))
            for at in range(8)
        ]  # fmt: skip

    def writes(self) -> list[Call]:
        """Requests that would change something."""
        return [c for c in self.calls if c.method != "GET" and c.path != "/v1/lookup"]

    def step(self, share: float = 1.0) -> None:
        """Let running jobs go on by ``share``."""
        self.jobs = [self._on(j, share) if j.state == "running" else j for j in self.jobs]

    @staticmethod
    def _on(found: api.Job, share: float) -> api.Job:
        settled = min(found.total, found.settled + math.ceil(found.total * share))
        over = settled == found.total
        return msgspec.structs.replace(
            found, settled=settled, bytes=settled << 23, state="done" if over else "running",
            ended_s=time.time() if over else None,
        )  # fmt: skip

    def start(self, kind: str) -> api.Job:
        """A new job of 100 chunks."""
        new = job(1000 + len(self.jobs), kind, "running", total=100, settled=0, age_s=0.0)
        self.jobs.insert(0, new)
        return new


def answer(value: Any, status: int = 200) -> Response:
    """``value`` as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def problem(status: int, code: str, message: str, hint: str = "") -> Response:
    """A `Problem`."""
    return answer(api.Problem(error=api.ErrorBody(code=code, message=message, hint=hint)), status)


class Api:
    """The endpoints of one `World`."""

    def __init__(self, world: World) -> None:
        self.world = world

    def routes(self) -> list[Route]:
        """Everything below /v1."""
        w = self.world
        gets: dict[str, Callable[[Request], Any]] = {
            "health": lambda r: api.HealthReply(
                status="degraded" if w.problems else "ok", version="0.9.0", uptime_s=612_345.0,
                state="sqlite", instances=len(w.instances), chunks=1_204_331, problems=w.problems),
            "instances": lambda r: api.Instances(instances=w.instances),
            "instances/{name:path}":
                lambda r: self._one(w.instances, "name", r.path_params["name"]),
            "pins": lambda r: api.Pins(pins=w.pins),
            "jobs": self._jobs,
            "jobs/{name:path}": lambda r: self._one(w.jobs, "id", r.path_params["name"]),
            "usage": lambda r: api.UsageReply(
                usage=usage([i.name for i in w.instances if i.tiers][:12])),
            "quotas": lambda r: api.Quotas(quotas=w.quotas),
            "prefixes": lambda r: api.Prefixes(prefixes=w.prefixes),
            "history": lambda r: w.history,
            "misses/{name:path}": self._misses,
        }  # fmt: skip
        writes: list[tuple[str, str, Callable[[Request, bytes], Any], int]] = [
            *(("POST", kind, self._ordered(kind), 202) for kind in ORDERS),
            ("POST", "lookup", self._lookup, 200), ("POST", "pins", self._pin, 201),
            ("DELETE", "pins/{name:path}", self._unpin, 202),
            ("POST", "jobs/{name}/cancel", self._cancel, 200),
            ("PUT", "quotas", self._quota, 200), ("DELETE", "quotas/{name}", self._unlimit, 204),
        ]  # fmt: skip
        return [
            *(Route(f"/{p}", self._guarded(lambda r, b, f=f: f(r), 200)) for p, f in gets.items()),
            *(Route(f"/{p}", self._guarded(f, status), methods=[m]) for m, p, f, status in writes),
        ]

    def _guarded(
        self, endpoint: Callable[[Request, bytes], Any], status: int
    ) -> Callable[[Request], Awaitable[Response]]:
        async def call(request: Request) -> Response:
            world, body = self.world, await request.body()
            if request.headers.get("authorization") != f"Bearer {world.token}":
                hint = "The token is in the controller's token file."
                return problem(401, "unauthorized", "The token is missing or wrong", hint)
            key = request.headers.get("idempotency-key")
            said = msgspec.json.decode(body) if body else None
            path = request.url.path
            world.calls.append(Call(request.method, path, request.url.query, said, key))
            del world.calls[:-5000]
            if path in world.broken:
                return problem(world.broken[path], "internal", f"{path} is broken", "Try later.")
            if request.method != "GET" and world.hold is not None:
                await world.hold.wait()
            if key is not None and key in world.known:
                return Response(world.known[key], status, media_type="application/json")
            try:
                found = endpoint(request, body)
            except msgspec.ValidationError as error:
                return problem(400, "invalid", str(error))
            except LookupError as error:
                return problem(404, "not_found", f"{error.args[0]} is not known")
            if key is not None:
                world.known[key] = b"" if found is None else msgspec.json.encode(found)
            return Response(status_code=204) if found is None else answer(found, status)

        return call

    @staticmethod
    def _one(items: list[Any], name: str, wanted: str) -> Any:
        for item in items:
            if getattr(item, name) == wanted:
                return item
        raise LookupError(wanted)

    def _jobs(self, request: Request) -> api.Jobs:
        state = request.query_params.get("state")
        found = [j for j in self.world.jobs if state in (None, j.state)]
        return api.Jobs(jobs=found[: int(request.query_params.get("limit", "100"))])

    def _misses(self, request: Request) -> api.Misses:
        name = request.path_params["name"]
        if name == "unknown":
            raise LookupError(name)
        now_s = time.time()
        rows = [("", "", None)] * 6 + [("evicted", "host by lru", now_s - 300)] * 3
        rows += [("identity.dtype", "fp8 there, bf16 here", None)] + [("not_needed", "", None)] * 4
        misses = [api.Miss(index=at, key=chunk_key(at), reason=r, detail=d, at_s=s)
                  for at, (r, d, s) in enumerate(rows)]  # fmt: skip
        return api.Misses(request_id=name, instance="llama-0", misses=misses)

    def _ordered(self, kind: str) -> Callable[[Request, bytes], api.Job]:
        def order(request: Request, body: bytes) -> api.Job:
            msgspec.json.decode(body, type=ORDERS[kind])
            return self.world.start(kind)

        return order

    def _lookup(self, request: Request, body: bytes) -> api.LookupReply:
        select = msgspec.json.decode(body, type=api.LookupRequest).select
        keys = select.keys or [chunk_key(at) for at in range(8)]
        holdings = [
            api.Holding(instance=name, chunks=n, tokens=n * 256, tiers=[
                api.TierHolding(tier="host", chunks=n // 2, tokens=n // 2 * 256),
                api.TierHolding(tier="disk", chunks=n, tokens=n * 256)])
            for name, n in (("llama-0", len(keys)), ("llama-2", len(keys) // 2)) if n
        ]  # fmt: skip
        tokens = 0 if select.keys else len(keys) * 256 + 37
        return api.LookupReply(model=select.model or MODEL, chunk_size=256, prompt_tokens=tokens,
                               chunks=len(keys), keys=keys, instances=holdings)  # fmt: skip

    def _pin(self, request: Request, body: bytes) -> api.Pin:
        asked = msgspec.json.decode(body, type=api.PinRequest)
        now_s, made = time.time(), self.world.start("pin")
        pin = api.Pin(id=f"pin-{len(self.world.pins)}", owner=asked.owner, tier=asked.tier,
                      instances=asked.instances or ["llama-0"], model=MODEL, chunks=8,
                      made_s=now_s, until_s=now_s + asked.ttl_s, job=made.id)  # fmt: skip
        self.world.pins.append(pin)
        return pin

    def _unpin(self, request: Request, body: bytes) -> api.Job:
        pin = self._one(self.world.pins, "id", request.path_params["name"])
        self.world.pins.remove(pin)
        return self.world.start("unpin")

    def _cancel(self, request: Request, body: bytes) -> api.Job:
        found = self._one(self.world.jobs, "id", request.path_params["name"])
        ended = msgspec.structs.replace(found, state="cancelled", ended_s=time.time())
        self.world.jobs[self.world.jobs.index(found)] = ended
        return ended

    def _unlimit(self, request: Request, body: bytes) -> None:
        quota = self._one(self.world.quotas, "id", request.path_params["name"])
        self.world.quotas.remove(quota)

    def _quota(self, request: Request, body: bytes) -> api.Quota:
        asked = msgspec.json.decode(body, type=api.QuotaRequest)
        quota = api.Quota(id=f"q-{len(self.world.quotas) + 1}", tenant_id=asked.tenant_id or "",
                          tier=asked.tier, bytes=asked.bytes)  # fmt: skip
        self.world.quotas.append(quota)
        return quota


def build(world: World) -> Any:
    """The ASGI application of ``world``, with the page and the headers it is served with."""
    app = Starlette(routes=[
        Route("/", lambda request: FileResponse(WEB / "index.html")),
        Mount("/web", StaticFiles(directory=WEB)),
        Mount("/v1", routes=Api(world).routes()),
    ])  # fmt: skip

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                named = ((b"content-security-policy", CSP), (b"x-content-type-options", "nosniff"),
                         (b"referrer-policy", "no-referrer"))  # fmt: skip
                message["headers"] += [(name, value.encode()) for name, value in named]
            await send(message)

        api_call = scope.get("path", "").startswith("/v1")
        if world.mode == "away" and api_call:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            return  # uvicorn drops the connection of an answer without an end
        if world.mode == "gateway" and api_call:
            page = Response("<h1>Bad gateway</h1>", 502, media_type="text/html")
            return await page(scope, receive, sent)
        await app(scope, receive, sent)

    return guarded


if __name__ == "__main__":
    import uvicorn

    print(f"http://127.0.0.1:8765, token {TOKEN}")
    uvicorn.run(build(World()), port=8765, log_level="warning")
