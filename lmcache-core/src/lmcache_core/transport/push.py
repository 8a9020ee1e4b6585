"""The prefiller's side: chunks that a decoder waits for go there as soon as they are in host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from lmcache_core.chunks import ChunkEngine
from lmcache_core.logs import EventLog
from lmcache_core.sdk import LMCacheError, OpContext, Piece, Status
from lmcache_core.tiers.framing import frame
from lmcache_core.tiers.host import HostChunk
from lmcache_core.transfer.executor import Executor, Lane
from lmcache_core.transport.hub import Hub
from lmcache_core.transport.messages import End, Offer, Pushed, Ready, Refuse, Stop, encode

CONNECT_TIMEOUT_S = 5.0
POLL_S = 0.02
_OURS = ("deadline", "closed")
"""Ends of which the decoder must be told: it waits no longer than it has to."""


@dataclass(slots=True)
class Push:
    """Chunks of one prompt on their way to one decoder.

    Attributes:
        over: nothing more is sent.
        pushed: chunks that the decoder has acknowledged.
        pushed_bytes: their payload.
    """

    transfer: str
    deadline_s: float
    over: bool = False
    pushed: int = 0
    pushed_bytes: int = 0
    peer: str = ""
    waiting: dict[bytes, bytes] = field(default_factory=dict)
    offered: bool = False
    in_flight: int = 0
    computed: bool = False


class Pusher:
    """Owner thread only, as the engine; messages are posted to it.

    Args:
        identity: what our chunks are, by field.
        max_pushes: prompts at the same time.
    """

    def __init__(
        self,
        engine: ChunkEngine,
        hub: Hub,
        executor: Executor,
        *,
        identity: Mapping[str, str],
        max_pushes: int,
    ) -> None:
        self._engine = engine
        self._hub = hub
        self._executor = executor
        self._identity = dict(identity)
        self._max_pushes = max_pushes
        self._live: dict[str, Push] = {}
        self._log = EventLog(engine.now_s)
        post = engine.runtime.completions.post
        hub.on(Offer, lambda peer, message: post(partial(self._offered, peer, message)))
        hub.on(Refuse, lambda peer, message: post(partial(self._refused, peer, message)))
        hub.on(Stop, lambda peer, message: post(partial(self._stopped, peer, message)))
        hub.on_lost(lambda peer: post(partial(self._lost, peer)))

    @property
    def busy(self) -> bool:
        """Whether something is still to be sent."""
        return bool(self._live)

    def start(self, transfer: str, address: str, *, deadline_s: float) -> Push | None:
        """Tell the decoder at ``address`` that we compute ``transfer``; None when it is pushed
        already, or too many are."""
        if transfer in self._live or len(self._live) >= self._max_pushes:
            self._count("not_started")
            return None
        push = self._live[transfer] = Push(transfer, deadline_s)
        self._submit(partial(self._reach, push, address), lambda: self._finish(push, "queue"))
        return push

    def computed(self, push: Push) -> None:
        """The engine computes nothing more for it; what is being stored is still sent."""
        push.computed = True
        self._advance(push)

    def tick(self) -> None:
        """Send what has come to host since."""
        now_s = self._engine.now_s()
        for push in list(self._live.values()):
            if now_s >= push.deadline_s:
                self._finish(push, "deadline")
            else:
                self._advance(push)

    def close(self) -> None:
        """Send nothing more."""
        for push in list(self._live.values()):
            self._finish(push, "closed")

    def _reach(self, push: Push, address: str) -> None:
        until_s = min(push.deadline_s, self._engine.now_s() + CONNECT_TIMEOUT_S)
        try:
            peer = self._hub.reach(address, until_s)
        except LMCacheError:
            self._post(lambda: self._finish(push, "not_reached"))
            return
        self._post(lambda: self._reached(push, peer))

    def _reached(self, push: Push, peer: str) -> None:
        push.peer = peer
        if not push.over and not self._hub.send(
            peer, Ready(transfer=push.transfer, identity=self._identity)
        ):
            self._finish(push, "lost")

    def _offered(self, peer: str, message: Offer) -> None:
        push = self._live.get(message.transfer)
        if push is None or push.peer != peer or len(message.keys) != len(message.tickets):
            self._count("unexpected")
            return
        push.waiting |= zip(message.keys, message.tickets)
        push.offered = push.offered or message.last
        self._advance(push)

    def _refused(self, peer: str, message: Refuse) -> None:
        push = self._live.get(message.transfer)
        if push is not None and push.peer == peer:
            self._log.warn("decoder_refused", peer=peer, reason=repr(message.reason))
            self._finish(push, "refused")

    def _stopped(self, peer: str, message: Stop) -> None:
        push = self._live.get(message.transfer)
        if push is not None and push.peer == peer:
            self._finish(push, "stopped")

    def _lost(self, peer: str) -> None:
        for push in list(self._live.values()):
            if push.peer == peer:
                self._finish(push, "lost")

    def _advance(self, push: Push) -> None:
        host = self._engine.host
        for key in list(push.waiting):
            chunk = host.get(key)
            if chunk is not None:
                ticket = push.waiting.pop(key)
                host.pin(chunk)
                push.in_flight += 1
                settle = partial(self._sent, push, chunk)
                self._submit(
                    partial(self._send, push, chunk, ticket), partial(settle, Status.FAILED)
                )
        if push.computed and push.offered and not push.in_flight and not push.over:
            coming = any(key in host or self._engine.is_arriving(key) for key in push.waiting)
            if not coming:
                self._hub.send(push.peer, End(transfer=push.transfer, pushed=push.pushed))
                self._finish(push, "not_computed" if push.waiting else "")

    def _send(self, push: Push, chunk: HostChunk, ticket: bytes) -> None:
        """On a thread: write the slot, header and all."""
        host, channel = self._engine.host, self._hub.channel
        status = Status.FAILED
        try:
            view = host.slot(chunk)
            frame(chunk, view)
            done = encode(Pushed(transfer=push.transfer, key=chunk.key))
            number = channel.write(
                push.peer,
                ticket,
                [Piece(host.buffer(chunk, view), 0)],
                OpContext(deadline_s=push.deadline_s),
                notification=done,
            )
            while (answers := channel.wait(number, POLL_S)) is None:
                if push.over:
                    channel.cancel(number)
            status = answers[0]
        except LMCacheError as error:
            self._log.warn("push_failed", peer=push.peer, reason=repr(str(error)))
        self._post(partial(self._sent, push, chunk, status))

    def _sent(self, push: Push, chunk: HostChunk, status: Status) -> None:
        push.in_flight -= 1
        if status is Status.ABANDONED:
            self._engine.hold(chunk)
        else:
            self._engine.host.unpin(chunk)
        self._count(status.value)
        if status is Status.OK:
            push.pushed += 1
            push.pushed_bytes += chunk.payload_bytes
            self._engine.metrics.counter("push.bytes").inc(chunk.payload_bytes)
        if not push.over:
            self._advance(push)

    def _finish(self, push: Push, reason: str) -> None:
        if not push.over:
            push.over = True
            if push.peer and reason in _OURS:
                self._hub.send(push.peer, End(transfer=push.transfer, pushed=push.pushed))
            push.waiting.clear()
            self._live.pop(push.transfer, None)
            self._count(f"ended.{reason or 'whole'}")

    def _submit(self, work: Callable[[], None], refused: Callable[[], None]) -> None:
        if not self._executor.submit(work, Lane.LOAD):
            self._count("dropped_queue")
            self._post(refused)

    def _post(self, callback: Callable[[], None]) -> None:
        self._engine.runtime.completions.post(callback)

    def _count(self, name: str) -> None:
        self._engine.metrics.counter(f"push.{name}").inc()
