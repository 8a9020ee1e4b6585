"""One request's way: to a prefiller and a decoder at once, and the decoder's answer back."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable

import anyio
import httpx
from starlette.types import Send

from lmcache_core.logs import EventLog
from lmcache_core.proxy.config import Engine, ProxyConfig
from lmcache_core.proxy.counts import Counts
from lmcache_core.proxy.pool import Lease, Outcome, Pool
from lmcache_core.proxy.request import Asked, Refusal
from lmcache_core.proxy.upstream import Answer, Headers, Upstream

_ATTEMPTS = 2
_LATE_S = 1.0
"""How long a prefiller may still answer when the decoder is done."""


class Prefill:
    """A request at a prefiller, which nothing waits for."""

    def __init__(self, task: asyncio.Task[str]) -> None:
        self._task = task
        self.late = False

    def cancel(self) -> None:
        """It is not wanted any more, and that says nothing about the prefiller."""
        self._task.cancel()

    def outlived(self) -> None:
        """The decoder is done: give the prefiller a last moment."""
        if not self._task.done():
            asyncio.get_running_loop().call_later(_LATE_S, self._give_up)

    def _give_up(self) -> None:
        self.late = not self._task.done()
        self._task.cancel()


class Exchange:
    """Sends requests to engines, and knows how these are.  Belongs to one event loop."""

    def __init__(
        self,
        config: ProxyConfig,
        *,
        now_s: Callable[[], float] = time.monotonic,
        new_id: Callable[[], str] = lambda: secrets.token_hex(16),
    ) -> None:
        self.prefillers = Pool(config.prefillers, retry_s=config.retry_s, now_s=now_s)
        self.decoders = Pool(config.decoders, retry_s=config.retry_s, now_s=now_s)
        self.counts = Counts()
        self._upstream = Upstream(config)
        self._stall_timeout_s = config.stall_timeout_s
        self._new_id = new_id
        self._log = EventLog()
        self._prefills: set[asyncio.Task[str]] = set()

    async def close(self) -> None:
        """End what prefillers still do, and every connection."""
        for task in self._prefills:
            task.cancel()
        await asyncio.gather(*self._prefills, return_exceptions=True)
        await self._upstream.close()

    async def relay(self, path: str, asked: Asked | None, headers: Headers, send: Send) -> None:
        """Answer ``asked``, or a GET of ``path``, with what a decoder says; cancelled, it leaves
        nothing behind at the engines.

        Raises:
            Refusal: no decoder can be reached.  Nothing was sent.
        """
        outcome = "internal_error"
        tried: list[Engine] = []
        try:
            for attempt in range(_ATTEMPTS):
                lease = self.decoders.pick(
                    len(asked.body) if asked else 0, without=tried, at_any_cost=True
                )
                if lease is None:
                    break
                self.counts.decode_retries += attempt
                tried.append(lease.engine)
                outcome = await self._attempt(path, asked, lease, headers, send)
                if outcome != "no_decoder":
                    return
            raise Refusal(502, "no decode engine can be reached", "no_decoder")
        except asyncio.CancelledError:
            outcome = "client_left"
            raise
        finally:
            self.counts.requests[outcome] += 1

    async def _attempt(
        self, path: str, asked: Asked | None, lease: Lease, headers: Headers, send: Send
    ) -> str:
        """The outcome as `Counts.requests` names it; ``no_decoder``: nothing was sent yet."""
        prefill, body = self._start(asked, lease.engine, headers)
        how = Outcome.CANCELLED
        begun = False
        try:
            asking = self._upstream.ask(lease.engine, path, headers=headers, body=body)
            async with asking as answer:
                self.decoders.answered(lease)
                begun = True
                await self._pass_on(answer, send)
            how = Outcome.FAILED if answer.status >= 500 else Outcome.DONE
            if prefill is not None and answer.status < 400:
                prefill.outlived()
                prefill = None
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return "completed" if answer.status < 400 else "engine_error"
        except httpx.HTTPError as error:
            how = Outcome.FAILED
            event = "pd_decoder_broke" if begun else "pd_decoder_failed"
            self._log.warn(event, url=lease.engine.url, error=type(error).__name__)
            return "broken" if begun else "no_decoder"
        except TimeoutError:
            return "client_left"
        finally:
            self.decoders.end(lease, how)
            if prefill is not None:
                prefill.cancel()

    async def _pass_on(self, answer: Answer, send: Send) -> None:
        """All but the end, which says that nothing is missing.

        Raises:
            httpx.HTTPError: the engine is lost.
            TimeoutError: the client does not read.
        """
        await send(
            {"type": "http.response.start", "status": answer.status, "headers": answer.headers}
        )
        piece = answer.first
        while piece:
            with anyio.fail_after(self._stall_timeout_s):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            piece = await anext(answer.rest, b"")

    def _start(
        self, asked: Asked | None, decoder: Engine, headers: Headers
    ) -> tuple[Prefill | None, bytes | None]:
        """The prefiller's part, begun, and what the decoder is sent."""
        if asked is None:
            return None, None
        lease = None if asked.alone else self.prefillers.pick(len(asked.body))
        if lease is None:
            self.counts.alone[asked.alone or "no_prefiller"] += 1
            return None, asked.for_decoder("")
        transfer_id = self._new_id()
        body = asked.for_prefiller(transfer_id, decoder.channel)
        task = asyncio.create_task(self._prefill(lease.engine, asked.path, headers, body))
        prefill = Prefill(task)
        self._prefills.add(task)
        # Not in the task itself: one that is cancelled before its first step never runs.
        task.add_done_callback(lambda task: self._prefilled(task, lease, prefill))
        return prefill, asked.for_decoder(transfer_id)

    async def _prefill(self, engine: Engine, path: str, headers: Headers, body: bytes) -> str:
        """The outcome as `Counts.prefills` names it."""
        try:
            status = await self._upstream.discard(engine, path, headers=headers, body=body)
        except httpx.HTTPError as error:
            self._log.warn("pd_prefiller_failed", url=engine.url, error=type(error).__name__)
            return "failed"
        if status >= 400:
            self._log.warn("pd_prefiller_refused", url=engine.url, status=status)
        # 4xx is the request's fault: no client may take an engine away from the others.
        return "failed" if status >= 500 else "refused" if status >= 400 else "done"

    def _prefilled(self, task: asyncio.Task[str], lease: Lease, prefill: Prefill) -> None:
        self._prefills.discard(task)
        if task.cancelled():
            outcome = "late" if prefill.late else "cancelled"
        else:
            error = task.exception()
            if error is not None:
                self._log.warn("pd_prefill_error", url=lease.engine.url, error=repr(error))
            outcome = "failed" if error is not None else task.result()
        self.counts.prefills[outcome] += 1
        self.prefillers.end(lease, _HOW[outcome])


_HOW = {
    "done": Outcome.DONE,
    "refused": Outcome.DONE,
    "failed": Outcome.FAILED,
    "late": Outcome.LATE,
    "cancelled": Outcome.CANCELLED,
}
