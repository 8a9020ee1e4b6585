"""`PeerConnector`: the host tier of another engine, as a store that is only read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lmcache_core.sdk import (
    BackendClosed,
    BackendUnavailable,
    Buffer,
    Capabilities,
    GetResult,
    Health,
    MemoryKind,
    OpContext,
    Piece,
    RemoteConnector,
    Sharing,
    Status,
    Unsupported,
)
from lmcache_core.transport.hub import Hub
from lmcache_core.transport.messages import Ask, Borrow, Have, Lent, Message, Return

MAX_CALLS = 8
"""At the same time."""
READ_SHARE = 0.9
"""Of the time that is left, for the read; the rest ends it in time."""

T = TypeVar("T")


def peer_capabilities(max_batch: int) -> Capabilities:
    """Of whatever reads other engines' host tiers, so many chunks in one call."""
    return Capabilities(
        max_concurrency=MAX_CALLS,
        max_batch=max_batch,
        memory=frozenset({MemoryKind.HOST, MemoryKind.PINNED}),
        evicts=True,
        sharing=Sharing.CLUSTER,
        zero_copy=True,
    )


class PeerConnector(RemoteConnector):
    """Thread-safe.  Values are slots with their envelope, which core verifies.

    Args:
        hub: ours; it is not closed.
        address: where the peer listens.
        max_batch: chunks in one call.
    """

    def __init__(self, hub: Hub, address: str, *, max_batch: int = 64) -> None:
        self.capabilities = peer_capabilities(max_batch)
        self._hub = hub
        self._address = address
        self._closed = False

    def exists(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        have = self._call(ctx, lambda ask: Ask(ask=ask, keys=list(keys)), Have)
        if have is None:
            return [Status.TIMED_OUT] * len(keys)
        if len(have.present) != len(keys):
            return [Status.FAILED] * len(keys)
        return [Status.OK if present else Status.MISS for present in have.present]

    def get_into(
        self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> list[GetResult]:
        lent = self._call(ctx, lambda ask: Borrow(ask=ask, keys=list(keys)), Lent)
        if lent is None:
            return [GetResult(Status.TIMED_OUT)] * len(keys)
        results = [GetResult(Status.MISS)] * len(keys)
        wanted: list[tuple[int, Piece]] = []
        for span, (number, nbytes) in enumerate(zip(lent.lent, lent.nbytes)):
            if not 0 <= number < len(keys) or nbytes <= 0:
                return [GetResult(Status.FAILED)] * len(keys)
            target = targets[number]
            if target.view is None or nbytes > target.nbytes:
                results[number] = GetResult(Status.SIZE_MISMATCH, nbytes)
                continue
            part = Buffer(
                view=target.view[:nbytes],
                address=target.address,
                nbytes=nbytes,
                memory=target.memory,
                region=target.region,
                token=target.token,
            )
            wanted.append((number, Piece(part, span)))
        if wanted:
            statuses = self._read(lent, [piece for _, piece in wanted], ctx)
            for (number, piece), status in zip(wanted, statuses):
                nbytes = piece.local.nbytes if status is Status.OK else 0
                results[number] = GetResult(status, nbytes)
        if lent.lent:
            hub = self._hub
            hub.send(hub.reach(self._address, ctx.deadline_s), Return(ask=lent.ask))
        return results

    def put_from(
        self, keys: Sequence[bytes], sources: Sequence[Buffer], ctx: OpContext
    ) -> list[Status]:
        raise Unsupported("a peer is only read", backend="peer", op="put_from")

    def delete(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        """Nothing: what a peer holds is the peer's."""
        return [Status.OK] * len(keys)

    def health(self, ctx: OpContext) -> Health:
        answer = self._call(ctx, lambda ask: Ask(ask=ask, keys=[]), Have)
        return Health(ok=answer is not None, reason="" if answer else "no answer in time")

    def close(self) -> None:
        self._closed = True

    def _read(self, lent: Lent, pieces: Sequence[Piece], ctx: OpContext) -> list[Status]:
        hub = self._hub
        left_s = max(0.0, ctx.deadline_s - hub.clock())
        until = OpContext(deadline_s=hub.clock() + left_s * READ_SHARE)
        peer = hub.reach(self._address, ctx.deadline_s)
        number = hub.channel.read(peer, lent.ticket, pieces, until)
        while (answers := hub.channel.wait(number, left_s)) is None:
            hub.channel.cancel(number)
        # A loan that ended meanwhile is a chunk that is not there.
        return [Status.MISS if status is Status.REJECTED else status for status in answers]

    def _call(self, ctx: OpContext, make: Callable[[int], Message], kind: type[T]) -> T | None:
        """The peer's answer; None when it did not come in time."""
        if self._closed:
            raise BackendClosed("the peer was closed", backend="peer", op="call")
        hub = self._hub
        try:
            answer = hub.call(hub.reach(self._address, ctx.deadline_s), make, ctx.deadline_s)
        except TimeoutError:
            return None
        if not isinstance(answer, kind):
            raise BackendUnavailable("the peer gave another answer", backend="peer", op="call")
        return answer
