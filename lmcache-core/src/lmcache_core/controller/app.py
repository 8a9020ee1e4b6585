"""The controller's HTTP side: who may ask, how much, and what for."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from importlib import resources
from typing import Any

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lmcache_core.controller import openapi
from lmcache_core.controller.api import Api, version
from lmcache_core.controller.config import LOOPBACK_NAMES, ControllerConfig
from lmcache_core.controller.core import Controller
from lmcache_core.controller.idempotency import Idempotency
from lmcache_core.controller.metrics import Latency
from lmcache_core.controller.operations import JSON, Answer, Call, Operation, Run
from lmcache_core.controller.problem import Refusal
from lmcache_core.controller.table import OPERATIONS
from lmcache_core.logs import EventLog

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": CSP,
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_UNREAD = (401, 408, 413, 415, 421)
"""Answers that may come before the whole body: the rest of it is not read."""
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}


def build(
    config: ControllerConfig,
    controller: Controller,
    *,
    on_start: Callable[[], None] = lambda: None,
) -> Starlette:
    """The ASGI application; it starts and stops ``controller``.

    Args:
        on_start: called when requests are answered.
    """
    gate = Gate(config, controller)
    paths: dict[str, dict[str, Operation]] = {}
    for operation in (*OPERATIONS, *_pages()):
        paths.setdefault(operation.path, {})[operation.method] = operation

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await controller.start()
        on_start()
        try:
            yield
        finally:
            await controller.stop()

    app = Starlette(
        routes=[Route(path, _Endpoint(gate, methods)) for path, methods in paths.items()],
        exception_handlers={HTTPException: gate.unknown},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


class Gate:
    """What every request passes.  Belongs to one event loop."""

    def __init__(self, config: ControllerConfig, controller: Controller) -> None:
        self.latency = Latency()
        document = msgspec.json.encode(openapi.document(version()))
        self._api = Api(controller, self.latency, document)
        self._config = config
        self._controller = controller
        self._idempotency = Idempotency(config, controller.documents)
        self._log = EventLog()
        self._hosts = {name.lower() for name in (*LOOPBACK_NAMES, *config.allowed_hosts)}
        self._in_flight = {"operator": 0, "instance": 0}
        self._most = {
            "operator": config.max_in_flight,
            # One that waits, and one that has come after it.
            "instance": 2 * config.max_instances,
        }
        self._body_bytes = 0

    async def unknown(self, request: Request, error: Exception) -> Response:
        """404 for an address that is none."""
        try:
            self._check_host(request)
            raise Refusal(404, "not_found", "there is no such address here")
        except Refusal as refusal:
            return _refused(refusal)

    async def answer(self, request: Request, receive: Receive, operation: Operation) -> Response:
        """The answer to one request, also when it can't be done."""
        start_s = time.monotonic()
        try:
            response = _response(await self._admitted(request, receive, operation))
        except Refusal as refusal:
            response = _refused(refusal)
        except Exception as error:
            # Its text may have of the request's body in it.
            self._controller.counts["internal_error"] += 1
            self._log.warn(
                "controller_bug", operation=operation.name, error=type(error).__name__,
                at=_place(error),
            )  # fmt: skip
            response = _refused(Refusal(500, "internal_error", "this is a bug of the controller"))
        self.latency.observe(operation.name, response.status_code, time.monotonic() - start_s)
        return response

    async def _admitted(self, request: Request, receive: Receive, operation: Operation) -> Answer:
        if operation.name != "alive":  # probes name an address
            self._check_host(request)
        if operation.token == "none":
            return await operation.run(self._api, Call(path=request.path_params, query={}))
        self._check_token(request, operation)
        if self._in_flight[operation.token] >= self._most[operation.token]:
            raise Refusal(503, "busy", "too many requests at a time", retry_after_s=1)
        self._in_flight[operation.token] += 1
        self.latency.in_flight += 1
        held = [0]
        try:
            call = Call(path=request.path_params, query=_query(request, operation))
            body = await self._body(request, receive, operation, held)
            if operation.body is not None:
                call.body = _decoded(body, operation)
            return await self._run(request, receive, operation, call, body)
        finally:
            self._in_flight[operation.token] -= 1
            self.latency.in_flight -= 1
            self._body_bytes -= held[0]

    async def _run(
        self,
        request: Request,
        receive: Receive,
        operation: Operation,
        call: Call,
        body: bytes,
    ) -> Answer:
        key = request.headers.get("idempotency-key") if operation.makes else None
        if key is not None:
            what = f"{operation.method} {request.url.path}".encode()
            run = partial(operation.run, self._api)
            return await self._idempotency.once(key, what + b"\n" + body, call, run)
        if not operation.waits:
            return await operation.run(self._api, call)
        watch = asyncio.create_task(_watch(receive, call.gone))
        try:
            return await operation.run(self._api, call)
        finally:
            watch.cancel()

    def _check_host(self, request: Request) -> None:
        """A page of a stranger reaches us under the stranger's name (DNS rebinding)."""
        host = request.headers.get("host", "")
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if name not in self._hosts or len(request.headers.getlist("host")) != 1:
            raise Refusal(
                421, "unknown_host", "this is not a name of the controller", hint="--allow-host"
            )

    def _check_token(self, request: Request, operation: Operation) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        shown = given.strip().encode("latin-1")
        admitted = hmac.compare_digest(shown, self._config.token.encode())
        if operation.token == "instance" and self._config.instance_token:
            admitted |= hmac.compare_digest(shown, self._config.instance_token.encode())
        if not admitted or scheme.lower() != "bearer":
            raise Refusal(
                401,
                "invalid_token",
                "the bearer token is missing or wrong",
                hint="send Authorization: Bearer, with the token of the controller's token file",
            )

    async def _body(
        self, request: Request, receive: Receive, operation: Operation, held: list[int]
    ) -> bytes:
        """The body, of at most the limit; ``held`` counts what is in memory for it."""
        limit = operation.max_body_bytes or self._config.max_body_bytes
        if operation.body is None:
            limit = 0
        else:
            _check_type(request, operation)
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit > 0:
            raise _too_large(limit)
        pieces: list[bytes] = []
        more = True
        try:
            with anyio.fail_after(self._config.body_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(408, "client_left", "the body did not come")
                    piece = message.get("body", b"")
                    more = message.get("more_body", False)
                    if operation.body is None:
                        continue  # nobody reads it
                    held[0] += len(piece)
                    self._body_bytes += len(piece)
                    if held[0] > limit:
                        raise _too_large(limit)
                    if self._body_bytes > self._config.max_held_body_bytes:
                        raise Refusal(503, "busy", "too many bodies at a time", retry_after_s=1)
                    pieces.append(piece)
        except TimeoutError:
            raise Refusal(408, "timeout", "the body did not come in time") from None
        return b"".join(pieces)


class _Endpoint:
    """One path: an ASGI application."""

    def __init__(self, gate: Gate, methods: dict[str, Operation]) -> None:
        self._gate = gate
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        operation = self._methods.get(request.method)
        if operation is None:
            allow = ", ".join(sorted(self._methods))
            refusal = Refusal(405, "method_not_allowed", f"use {allow}", allow=allow)
            await _refused(refusal)(scope, receive, send)
            return
        response = await self._gate.answer(request, receive, operation)
        await response(scope, receive, send)


def _pages() -> Iterable[Operation]:
    """The page and its files: what is in ``web`` when we start, and nothing else."""
    folder = resources.files("lmcache_core.controller") / "web"
    if not folder.is_dir():
        return
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        media_type = _MEDIA_TYPES.get("." + file.name.rpartition(".")[2])
        if media_type is None or not file.is_file():
            continue
        answer = Answer(
            body=file.read_bytes(), media_type=media_type, headers={"cache-control": "no-cache"}
        )
        paths = [f"/web/{file.name}"] + (["/"] if file.name == "index.html" else [])
        for path in paths:
            yield Operation(
                method="GET", path=path, name="page", text="", run=_always(answer), token="none"
            )


def _always(answer: Answer) -> Run:
    async def run(api: Any, call: Call) -> Answer:
        return answer

    return run


async def _watch(receive: Receive, gone: asyncio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()


def _query(request: Request, operation: Operation) -> dict[str, Any]:
    given = request.query_params.multi_items()
    known = {query.name: query for query in operation.query}
    for name, _ in given:
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise Refusal(
                422, "unknown_parameter", "an unknown query parameter", hint=f"known: {allowed}"
            )
    if len({name for name, _ in given}) != len(given):
        raise Refusal(422, "bad_parameter", "a query parameter is given twice")
    found = {name: query.default for name, query in known.items()}
    for name, text in given:
        try:
            found[name] = msgspec.convert(text, known[name].type, strict=False)
        except msgspec.ValidationError as error:
            raise Refusal(422, "bad_parameter", f"{name}: {error}") from error
    return found


def _check_type(request: Request, operation: Operation) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != operation.media_type:
        # Any other can be sent by a stranger's web page without asking.
        raise Refusal(415, "unsupported_media_type", f"send Content-Type: {operation.media_type}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "unsupported_encoding", "send the body as it is, not encoded")


def _decoded(body: bytes, operation: Operation) -> Any:
    decode = msgspec.json.decode if operation.media_type == JSON else msgspec.msgpack.decode
    try:
        return decode(body, type=operation.body)
    except msgspec.ValidationError as error:
        raise Refusal(422, "invalid", str(error), hint="GET /openapi.json has the schema") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refusal(400, "malformed", f"the body is no {operation.media_type}") from None


def _too_large(limit: int) -> Refusal:
    return Refusal(413, "body_too_large", f"the body is larger than {limit} bytes")


def _response(answer: Answer) -> Response:
    body = b"" if answer.status == 204 else answer.encoded()
    headers = {**_HEADERS, **answer.headers}
    if answer.status != 204:
        headers["content-type"] = answer.media_type
    return Response(body, answer.status, headers)


def _refused(refusal: Refusal) -> Response:
    headers = {**_HEADERS, "content-type": JSON, **refusal.headers}
    if refusal.status in _UNREAD:
        headers["connection"] = "close"
    return Response(refusal.body, refusal.status, headers)


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
