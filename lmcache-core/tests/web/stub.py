"""A controller's HTTP API with canned, changing data, built from the types of
`lmcache_core.controller.messages` so that it can't drift from them.

``python lmcache-core/tests/web/stub.py`` serves it, to look at the page while working on it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from canned import GIB, MODEL, TENANTS, chunk_key, fleet, history, job, jobs, usage
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
