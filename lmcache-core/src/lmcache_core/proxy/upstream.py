"""HTTP to the engines."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx

from lmcache_core.proxy.config import Engine, ProxyConfig

Headers = list[tuple[bytes, bytes]]

_KEEPALIVE_S = 2.0
"""Below the 5 s after which vLLM closes an idle connection: a request sent into that looks like
a dead engine."""
_MAX_IDLE_CONNECTIONS = 32
_MAX_DISCARDED_BYTES = 1 << 20
_RELAYED = {
    b"content-type", b"content-length", b"content-encoding", b"cache-control", b"retry-after",
    b"www-authenticate", b"x-request-id",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """An engine's answer, of which the first piece is here.

    Attributes:
        first: b"" when there is no body.
        rest: pieces as they come; raises `httpx.HTTPError` when the engine is lost.
    """

    status: int
    headers: Headers
    first: bytes
    rest: AsyncIterator[bytes]


class Upstream:
    """One client an engine, so that a slow engine takes no other's connections."""

    def __init__(self, config: ProxyConfig) -> None:
        timeout = httpx.Timeout(config.stall_timeout_s, connect=config.connect_timeout_s)
        limits = httpx.Limits(
            # Twice: prefills may outlive the requests that they belong to.
            max_connections=2 * config.max_in_flight,
            max_keepalive_connections=_MAX_IDLE_CONNECTIONS,
            keepalive_expiry=_KEEPALIVE_S,
        )
        # One context: making it reads all certificates.
        verify = httpx.create_ssl_context()
        self._clients = {
            # trust_env: a proxy of the environment is not meant for engines.
            engine: httpx.AsyncClient(
                timeout=timeout, limits=limits, trust_env=False, verify=verify
            )
            for engine in (*config.prefillers, *config.decoders)
        }

    @contextlib.asynccontextmanager
    async def ask(
        self, engine: Engine, path: str, *, headers: Headers, body: bytes | None
    ) -> AsyncIterator[Answer]:
        """POST ``body``, or GET when there is none; leaving early closes the connection, which
        aborts the request in the engine.

        Raises:
            httpx.HTTPError: the engine can't be reached, or is lost before its first piece.
        """
        sent = [*headers, (b"accept-encoding", b"identity")]
        if body is not None:
            sent.append((b"content-type", b"application/json"))
        method = "GET" if body is None else "POST"
        request = self._clients[engine].stream(
            method, engine.url + path, headers=sent, content=body
        )
        async with request as response:
            pieces = response.aiter_raw()
            first = await anext(pieces, b"")
            kept = [
                (name.lower(), value)
                for name, value in response.headers.raw
                if name.lower() in _RELAYED
            ]
            yield Answer(response.status_code, kept, first, pieces)

    async def discard(self, engine: Engine, path: str, *, headers: Headers, body: bytes) -> int:
        """POST ``body`` and read the answer for nothing; its status.

        Raises:
            httpx.HTTPError: the engine can't be reached, or is lost.
        """
        async with self.ask(engine, path, headers=headers, body=body) as answer:
            size = len(answer.first)
            async for piece in answer.rest:
                size += len(piece)
                if size > _MAX_DISCARDED_BYTES:
                    break
            return answer.status

    async def close(self) -> None:
        """Close every connection."""
        for client in self._clients.values():
            await client.aclose()
