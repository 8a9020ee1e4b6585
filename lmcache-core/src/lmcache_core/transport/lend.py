"""The lender's side of reuse between peers: chunks in host that others may read for a while.

Asked by the channel's threads and answered on threads of its own, so that an engine which computes,
or stands idle, lends all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from lmcache_core.chunks import ChunkEngine
from lmcache_core.envelope import stored_bytes
from lmcache_core.sdk import Access, BackendUnavailable, Grant, LMCacheError, OpContext, Status
from lmcache_core.tiers.framing import frame
from lmcache_core.tiers.host import HostChunk
from lmcache_core.transfer.executor import Executor, Lane
from lmcache_core.transport.hub import Hub
from lmcache_core.transport.messages import Ask, Borrow, Have, Lent, Return

REVOKE_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class _Loan:
    chunks: tuple[HostChunk, ...]
    grant: Grant
    nbytes: int
    until_s: float


class Lender:
    """Thread-safe; what is given back is unpinned by the engine's owner.

    Args:
        lease_s: how long a peer may read.
        max_bytes: host memory that is lent at the same time.
    """

    def __init__(
        self, engine: ChunkEngine, hub: Hub, executor: Executor, *, lease_s: float, max_bytes: int
    ) -> None:
        self._engine = engine
        self._hub = hub
        self._executor = executor
        self._lease_s = lease_s
        self._max_bytes = max_bytes
        self._bytes = 0
        self._loans: dict[tuple[str, int], _Loan] = {}
        self._lock = threading.Lock()
        hub.on(Ask, self._asked)
        hub.on(Borrow, lambda peer, message: self._job(partial(self._borrow, peer, message)))
        hub.on(Return, lambda peer, message: self._job(partial(self._end, (peer, message.ask))))
        hub.on_lost(lambda peer: self._job(partial(self._lost, peer)))

    @property
    def lent_bytes(self) -> int:
        """Host memory that peers may read now."""
        return self._bytes

    def tick(self) -> None:
        """End the loans whose lease has ended; owner thread."""
        now_s = self._engine.now_s()
        with self._lock:
            ended = [name for name, loan in self._loans.items() if now_s >= loan.until_s]
        for name in ended:
            self._count("lease_ended")
            self._job(partial(self._end, name))

    def _asked(self, peer: str, message: Ask) -> None:
        host = self._engine.host
        present = [host.get(key) is not None for key in message.keys]
        self._hub.send(peer, Have(ask=message.ask, present=present))

    def _borrow(self, peer: str, message: Borrow) -> None:
        chunks, numbers = self._take(message.keys)
        host = self._engine.host
        ticket = b""
        if chunks:
            try:
                spans = []
                for chunk in chunks:
                    view = host.slot(chunk)
                    frame(chunk, view)
                    spans.append(host.buffer(chunk, view))
                grant = self._hub.channel.grant(
                    peer, spans, access=Access.READ, lease_s=self._lease_s
                )
            except (BackendUnavailable, LMCacheError):
                self._unpin(chunks)
                return
            ticket = grant.ticket
            nbytes = sum(stored_bytes(chunk.payload_bytes) for chunk in chunks)
            until_s = self._engine.now_s() + self._lease_s
            with self._lock:
                self._loans[peer, message.ask] = _Loan(tuple(chunks), grant, nbytes, until_s)
        sizes = [stored_bytes(chunk.payload_bytes) for chunk in chunks]
        answer = Lent(ask=message.ask, ticket=ticket, lent=numbers, nbytes=sizes)
        self._count("chunks", len(chunks))
        if not self._hub.send(peer, answer):
            self._end((peer, message.ask))

    def _take(self, keys: Sequence[bytes]) -> tuple[list[HostChunk], list[int]]:
        """Pinned chunks, and which of ``keys`` they are."""
        chunks: list[HostChunk] = []
        numbers: list[int] = []
        for number, key in enumerate(keys[: self._hub.channel.capabilities.max_pieces]):
            chunk = self._engine.host.lend(key)
            if chunk is None:
                continue
            nbytes = stored_bytes(chunk.payload_bytes)
            with self._lock:
                fits = self._bytes + nbytes <= self._max_bytes
                self._bytes += nbytes if fits else 0
            if not fits:
                self._count("refused")
                self._engine.runtime.completions.post(partial(self._engine.host.unpin, chunk))
                break
            chunks.append(chunk)
            numbers.append(number)
        return chunks, numbers

    def _end(self, name: tuple[str, int]) -> None:
        with self._lock:
            loan = self._loans.pop(name, None)
        if loan is None:
            return
        ctx = OpContext(deadline_s=self._engine.now_s() + REVOKE_TIMEOUT_S)
        status = self._hub.channel.revoke(loan.grant, ctx)
        self._unpin(loan.chunks, held=status is not Status.OK)

    def _unpin(self, chunks: Sequence[HostChunk], *, held: bool = False) -> None:
        with self._lock:
            self._bytes -= sum(stored_bytes(chunk.payload_bytes) for chunk in chunks)
        settle = self._engine.hold if held else self._engine.host.unpin

        def back() -> None:
            for chunk in chunks:
                settle(chunk)

        self._engine.runtime.completions.post(back)

    def _lost(self, peer: str) -> None:
        with self._lock:
            names = [name for name in self._loans if name[0] == peer]
        for name in names:
            self._end(name)

    def _job(self, work: partial[None]) -> None:
        if not self._executor.submit(work, Lane.LOAD):
            # The peer waits out its deadline, a loan its lease.
            self._count("dropped_queue")

    def _count(self, name: str, amount: int = 1) -> None:
        self._engine.metrics.counter(f"lend.{name}").inc(amount)
