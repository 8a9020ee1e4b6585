"""The decoder's side: slots that a prefiller writes, verified before anything serves them.

Each slot has a grant of its own, which ends before its bytes are looked at: what was verified can't
be written again.  A slot whose grant can't be ended is LOST until it can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

from lmcache_core.chunks import ChunkEngine
from lmcache_core.envelope import Verdict, stored_bytes, verify
from lmcache_core.layout import ChunkLayout
from lmcache_core.logs import EventLog
from lmcache_core.sdk import Access, BackendClosed, BackendUnavailable, Grant, OpContext, Status
from lmcache_core.tiers.host import HostChunk
from lmcache_core.transfer.executor import Executor, Lane
from lmcache_core.transport.hub import Hub
from lmcache_core.transport.messages import (
    MAX_OFFER_KEYS,
    End,
    Offer,
    Pushed,
    Ready,
    Refuse,
    Stop,
)

REVOKE_TIMEOUT_S = 1.0
MAX_REMEMBERED = 1024
"""Prefillers that spoke before their request came here, and transfers that are over."""

T = TypeVar("T")


class Missing(NamedTuple):
    """A chunk that a request needs."""

    key: bytes
    parent: bytes | None
    layout: ChunkLayout


@dataclass(slots=True)
class Expected:
    """What one request waits for.

    Attributes:
        transfer: its name, known to both sides.
        start_by_s: when a prefiller must have spoken.
        done: nothing more will come; what came is pinned until `Receiver.release`.
        reason: why it ended without everything, else "".
        received_bytes: payload that came.
    """

    transfer: str
    start_by_s: float
    deadline_s: float
    done: bool = False
    reason: str = ""
    received_bytes: int = 0
    peer: str = ""
    writing: dict[bytes, HostChunk] = field(default_factory=dict)
    grants: dict[bytes, Grant] = field(default_factory=dict)
    joined: set[bytes] = field(default_factory=set)
    pinned: list[HostChunk] = field(default_factory=list)
    settling: int = 0
    arrived: int = 0
    ends_after: int = -1


class Receiver:
    """Owner thread only, as the engine; messages are posted to it.

    Args:
        identity: what our chunks are, by field; a prefiller's must be equal.
        max_bytes: host memory that slots which are waited for may hold.
        start_timeout_s: how long a prefiller may take until it speaks.
    """

    def __init__(
        self,
        engine: ChunkEngine,
        hub: Hub,
        executor: Executor,
        *,
        identity: Mapping[str, str],
        max_bytes: int,
        start_timeout_s: float,
    ) -> None:
        self._engine = engine
        self._hub = hub
        self._executor = executor
        self._identity = dict(identity)
        self._max_bytes = max_bytes
        self._start_timeout_s = start_timeout_s
        self._bytes = 0
        self._live: dict[str, Expected] = {}
        self._early: dict[str, tuple[str, Ready]] = {}
        self._over: dict[str, None] = {}
        self._log = EventLog(engine.now_s)
        post = engine.runtime.completions.post
        hub.on(Ready, self._spoke)
        hub.on(Pushed, lambda peer, message: post(partial(self._pushed, peer, message)))
        hub.on(End, lambda peer, message: post(partial(self._ended, peer, message)))
        hub.on_lost(lambda peer: post(partial(self._lost, peer)))

    @property
    def busy(self) -> bool:
        """Whether some request waits, or a slot is not settled."""
        return bool(self._live)

    def expect(
        self, transfer: str, missing: Sequence[Missing], *, deadline_s: float
    ) -> Expected | None:
        """Have a prefiller write ``missing``, in order; those that are here are kept here.

        None when ``transfer`` is waited for already.
        """
        if transfer in self._live:
            self._count("duplicate")
            return None
        start_by_s = self._engine.now_s() + self._start_timeout_s
        expected = self._live[transfer] = Expected(transfer, start_by_s, deadline_s)
        for key, parent, layout in missing:
            resident = self._engine.host.get(key)
            if resident is not None:
                self._engine.host.pin(resident)
                expected.pinned.append(resident)
            elif key in self._engine.host or self._engine.is_arriving(key):
                expected.joined.add(key)
            elif not self._reserve(expected, key, parent, layout):
                break
        early = self._early.pop(transfer, None)
        if early is not None:
            self._ready(*early)
        self._look(expected)
        return expected

    def release(self, expected: Expected) -> None:
        """The request holds what it needs, or wants nothing more.  Idempotent."""
        self._finish(expected, "aborted")
        for chunk in expected.pinned:
            self._engine.host.unpin(chunk)
        expected.pinned.clear()

    def tick(self) -> None:
        """Look at deadlines, and at chunks that come in other ways."""
        now_s = self._engine.now_s()
        for expected in list(self._live.values()):
            if not expected.done and now_s >= expected.deadline_s:
                self._finish(expected, "deadline")
            elif not expected.done and not expected.peer and now_s >= expected.start_by_s:
                self._finish(expected, "no_prefiller")
            elif expected.joined:
                self._look(expected)

    def close(self) -> None:
        """Want nothing more."""
        for expected in list(self._live.values()):
            self.release(expected)

    def _reserve(
        self, expected: Expected, key: bytes, parent: bytes | None, layout: ChunkLayout
    ) -> bool:
        nbytes = stored_bytes(layout.payload_bytes)
        slot = None
        if self._bytes + nbytes <= self._max_bytes:
            slot = self._engine.host.reserve(key, parent, layout)
        if slot is None:
            self._count("no_room")
            return False
        self._bytes += nbytes
        expected.writing[key] = slot
        return True

    def _spoke(self, peer: str, message: Ready) -> None:
        """In the channel's thread: an engine that stands idle is not polled, and a prefiller must
        not wait for it."""
        if message.transfer in self._over:
            self._hub.send(peer, Refuse(transfer=message.transfer, reason="it has ended"))
        else:
            self._engine.runtime.completions.post(partial(self._ready, peer, message))

    def _ready(self, peer: str, message: Ready) -> None:
        differ = sorted(
            f"{name} {message.identity.get(name, 'none')!r} there, {ours!r} here"
            for name, ours in self._identity.items()
            if message.identity.get(name) != ours
        )
        expected = self._live.get(message.transfer)
        if differ:
            reason = "its chunks are not ours: " + "; ".join(differ)
            self._log.warn("prefiller_refused", peer=peer, reason=repr(reason))
            self._count("refused")
            self._hub.send(peer, Refuse(transfer=message.transfer, reason=reason))
            if expected is not None and not expected.peer:
                self._finish(expected, "refused")
        elif expected is None and message.transfer not in self._over:
            _keep(self._early, message.transfer, (peer, message))
        elif expected is None or expected.peer or expected.done:
            self._hub.send(peer, Refuse(transfer=message.transfer, reason="it has ended"))
        else:
            self._offer(expected, peer)

    def _offer(self, expected: Expected, peer: str) -> None:
        expected.peer = peer
        host = self._engine.host
        lease_s = expected.deadline_s - self._engine.now_s()
        try:
            for key, slot in expected.writing.items():
                buffer = host.buffer(slot, host.slot(slot))
                expected.grants[key] = self._hub.channel.grant(
                    peer, [buffer], access=Access.WRITE, lease_s=lease_s
                )
        except BackendUnavailable:
            self._finish(expected, "lost")
            return
        keys = list(expected.grants)
        for start in range(0, max(1, len(keys)), MAX_OFFER_KEYS):
            some = keys[start : start + MAX_OFFER_KEYS]
            offer = Offer(
                transfer=expected.transfer,
                keys=some,
                tickets=[expected.grants[key].ticket for key in some],
                last=start + MAX_OFFER_KEYS >= len(keys),
            )
            if not self._hub.send(peer, offer):
                self._finish(expected, "lost")
                return

    def _pushed(self, peer: str, message: Pushed) -> None:
        expected = self._live.get(message.transfer)
        if expected is None or expected.peer != peer or expected.done:
            self._count("late")
            return
        slot = expected.writing.pop(message.key, None)
        if slot is None:
            self._count("unexpected")
            return
        expected.settling += 1
        grant = expected.grants.pop(message.key)
        self._job(partial(self._verify, expected, slot, grant))

    def _verify(self, expected: Expected, slot: HostChunk, grant: Grant) -> None:
        """On a thread: end the grant, then look at the bytes."""
        status = self._revoke(grant)
        verdict = Verdict.MAGIC
        if status is Status.OK:
            view = self._engine.host.slot(slot)
            verdict = verify(view, key=slot.key, layout=slot.layout.fingerprint)
        self._post(partial(self._settled, expected, slot, status, verdict))

    def _settled(
        self, expected: Expected, slot: HostChunk, status: Status, verdict: Verdict
    ) -> None:
        self._bytes -= stored_bytes(slot.payload_bytes)
        expected.settling -= 1
        expected.arrived += 1
        if status is not Status.OK:
            self._engine.lose(slot)
            self._count("lost_slots")
        elif verdict is not Verdict.OK:
            self._engine.abort([slot])
            self._count(f"rejected.{verdict.value}")
            self._log.warn("pushed_chunk_rejected", peer=expected.peer, reason=verdict.value)
        else:
            slot.framed = True
            slot.origin = "prefiller"
            doomed = slot.doomed
            self._engine.commit([slot])
            self._count("chunks")
            self._engine.metrics.counter("receive.bytes").inc(slot.payload_bytes)
            if not doomed:
                expected.received_bytes += slot.payload_bytes
                self._engine.host.pin(slot)
                expected.pinned.append(slot)
                if expected.done:
                    # Nobody will take it from there.
                    expected.pinned.pop()
                    self._engine.host.unpin(slot)
        self._look(expected)

    def _ended(self, peer: str, message: End) -> None:
        expected = self._live.get(message.transfer)
        if expected is not None and expected.peer == peer:
            expected.ends_after = message.pushed
            self._look(expected)

    def _lost(self, peer: str) -> None:
        for transfer in [t for t, (name, _) in self._early.items() if name == peer]:
            del self._early[transfer]
        for expected in list(self._live.values()):
            if expected.peer == peer:
                self._finish(expected, "lost")

    def _look(self, expected: Expected) -> None:
        """End it when there is nothing left to wait for."""
        if expected.done:
            self._forget(expected)
            return
        host = self._engine.host
        for key in list(expected.joined):
            resident = host.get(key)
            if resident is not None:
                host.pin(resident)
                expected.pinned.append(resident)
                expected.joined.discard(key)
            elif key not in host and not self._engine.is_arriving(key):
                expected.joined.discard(key)
        if expected.joined or expected.settling:
            return
        if not expected.writing:
            self._finish(expected, "")
        elif 0 <= expected.ends_after <= expected.arrived:
            self._finish(expected, "not_computed")

    def _finish(self, expected: Expected, reason: str) -> None:
        if expected.done:
            return
        expected.done, expected.reason = True, reason
        self._count(f"ended.{reason or 'whole'}")
        if expected.writing and expected.peer:
            self._hub.send(expected.peer, Stop(transfer=expected.transfer))
        for key, slot in expected.writing.items():
            grant = expected.grants.pop(key, None)
            expected.settling += 1
            if grant is None:
                self._given_up(expected, slot, Status.OK)
            else:
                self._job(partial(self._give_up, expected, slot, grant))
        expected.writing.clear()
        self._forget(expected)

    def _give_up(self, expected: Expected, slot: HostChunk, grant: Grant) -> None:
        status = self._revoke(grant)
        self._post(partial(self._given_up, expected, slot, status))

    def _given_up(self, expected: Expected, slot: HostChunk, status: Status) -> None:
        self._bytes -= stored_bytes(slot.payload_bytes)
        expected.settling -= 1
        if status is Status.OK:
            self._engine.abort([slot])
        else:
            self._engine.lose(slot)
            self._count("lost_slots")
        self._forget(expected)

    def _forget(self, expected: Expected) -> None:
        over = expected.done and not expected.settling
        if over and self._live.pop(expected.transfer, None) is not None:
            # A prefiller that only comes now must not wait for it.
            _keep(self._over, expected.transfer, None)

    def _revoke(self, grant: Grant) -> Status:
        ctx = OpContext(deadline_s=self._engine.now_s() + REVOKE_TIMEOUT_S)
        try:
            return self._hub.channel.revoke(grant, ctx)
        except BackendClosed:
            # A close that did not wait for us: nobody says that the slot is free.
            return Status.ABANDONED

    def _job(self, work: Callable[[], None]) -> None:
        if not self._executor.submit(work, Lane.LOAD):
            # A slot must be settled, whatever else waits.
            self._count("inline")
            work()

    def _post(self, callback: Callable[[], None]) -> None:
        self._engine.runtime.completions.post(callback)

    def _count(self, name: str) -> None:
        self._engine.metrics.counter(f"receive.{name}").inc()


def _keep(table: dict[str, T], name: str, value: T) -> None:
    """Put it in; what has been there longest leaves when there is no room."""
    while len(table) >= MAX_REMEMBERED:
        del table[next(iter(table))]
    table[name] = value
