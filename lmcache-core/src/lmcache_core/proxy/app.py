"""The proxy's HTTP side: who may ask, how much, and what for."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Callable

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lmcache_core.proxy.config import ProxyConfig
from lmcache_core.proxy.counts import CONTENT_TYPE
from lmcache_core.proxy.exchange import Exchange
from lmcache_core.proxy.pool import State
from lmcache_core.proxy.request import Asked, Refusal
from lmcache_core.proxy.upstream import Headers

_BODY_TIMEOUT_S = 60.0
_PASSED_ON = {b"authorization", b"x-request-id", b"traceparent"}


def build(
    config: ProxyConfig,
    *,
    exchange: Exchange | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> Starlette:
    """The ASGI application.

    Args:
        exchange: another than ``config`` would make.
        on_start: called when requests are answered.
    """
    gate = _Gate(config, exchange or Exchange(config))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        on_start()
        try:
            yield
        finally:
            await gate.exchange.close()

    app = Starlette(
        routes=[
            Route("/v1/completions", _Relayed(gate), methods=["POST"]),
            Route("/v1/chat/completions", _Relayed(gate), methods=["POST"]),
            Route("/v1/models", _Relayed(gate), methods=["GET"]),
            Route("/health", gate.health, methods=["GET"]),
            Route("/metrics", gate.metrics, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _unknown, Refusal: _refused},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


class _Gate:
    """What every request passes."""

    def __init__(self, config: ProxyConfig, exchange: Exchange) -> None:
        self.config = config
        self.exchange = exchange

    def admits(self, request: Request) -> bool:
        """Whether the client has the token."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        token = self.config.token
        return not token or (
            scheme.lower() == "bearer"
            and hmac.compare_digest(given.encode("latin-1"), token.encode())
        )

    def require(self, request: Request) -> None:
        """Nothing, for a client that `admits`.

        Raises:
            Refusal: another.
        """
        if not self.admits(request):
            raise Refusal(401, "the bearer token is missing or wrong", "invalid_token")

    async def health(self, request: Request) -> Response:
        """Open to all, for load balancers; engines are told to those with the token."""
        states = self._states()
        well = any(state.healthy for state in states["decode"])
        found: dict[str, object] = {"status": "ok" if well else "no healthy decoder"}
        if self.admits(request):
            found |= {kind: [_shown(state) for state in states[kind]] for kind in states}
        return JSONResponse(found, 200 if well else 503)

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        self.require(request)
        return Response(self.exchange.counts.text(self._states()), media_type=CONTENT_TYPE)

    def _states(self) -> dict[str, list[State]]:
        return {
            "prefill": self.exchange.prefillers.states(),
            "decode": self.exchange.decoders.states(),
        }


class _Relayed:
    """An ASGI endpoint whose answer a decoder gives."""

    def __init__(self, gate: _Gate) -> None:
        self._gate = gate
        self._config = gate.config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        counts = self._gate.exchange.counts
        try:
            request = Request(scope)
            self._gate.require(request)
            if counts.in_flight >= self._config.max_in_flight:
                raise Refusal(429, "too many requests in flight", "too_many", retry_after_s=1)
            counts.in_flight += 1
            try:
                await self._admitted(request, receive, send)
            finally:
                counts.in_flight -= 1
        except Refusal as refusal:
            if refusal.status != 502:  # that one was counted by its outcome
                counts.requests["busy" if refusal.status == 429 else "refused"] += 1
            await _response(refusal)(scope, receive, send)

    async def _admitted(self, request: Request, receive: Receive, send: Send) -> None:
        path, asked = request.scope["path"], None
        if request.method == "POST":
            body = await self._body(request, receive)
            if body is None:
                self._gate.exchange.counts.requests["client_left"] += 1
                return
            asked = Asked.parse(path, body)
        headers: Headers = [
            (name, value) for name, value in request.headers.raw if name.lower() in _PASSED_ON
        ]
        if any(byte < 0x20 or byte == 0x7F for _, value in headers for byte in value):
            # Not sendable: it would look like the engine's failure.
            raise Refusal(400, "a header has a control character in it", "invalid_header")
        task = asyncio.create_task(self._gate.exchange.relay(path, asked, headers, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)
        if not task.cancelled():
            task.result()

    async def _body(self, request: Request, receive: Receive) -> bytes | None:
        """The body; None when the client left."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Any other can be sent by a stranger's web page without asking.
            raise Refusal(415, "send Content-Type: application/json", "unsupported_media_type")
        limit = self._config.max_body_bytes
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise _too_large(limit)
        pieces: list[bytes] = []
        size, more = 0, True
        try:
            with anyio.fail_after(_BODY_TIMEOUT_S):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    more = message.get("more_body", False)
                    if size > limit:
                        raise _too_large(limit)
        except TimeoutError:
            raise Refusal(408, "the body did not come in time", "timeout") from None
        return b"".join(pieces)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is larger than {limit} bytes", "body_too_large")


def _shown(state: State) -> dict[str, object]:
    return {
        "url": state.engine.url,
        "healthy": state.healthy,
        "in_flight": state.in_flight,
    }


def _response(refusal: Refusal) -> Response:
    headers = {}
    if refusal.retry_after_s:
        headers["retry-after"] = str(refusal.retry_after_s)
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(refusal.body, refusal.status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _response(error)


async def _unknown(request: Request, error: Exception) -> Response:
    return _response(Refusal(404, "there is no such address here", "not_found"))
