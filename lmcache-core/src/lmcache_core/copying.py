"""Chunks copied from tier to tier of one engine, or from another engine's host tier."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from lmcache_core.chunks import ChunkEngine
from lmcache_core.layout import ChunkLayout
from lmcache_core.pins import Run
from lmcache_core.sdk import ConfigError, Status, Unsupported
from lmcache_core.tiers.host import HostChunk
from lmcache_core.tiers.remote import RemoteTier

AT_ONCE = 4
"""Chunks on their way; each holds host memory."""
BUSY_S = 10.0
"""How long a chunk that somebody else is writing is waited for."""

_Want = tuple[bytes, bytes | None, ChunkLayout]


class Copying:
    """One order.  Owner thread only; starts when it is made, goes on with `step`.

    Every chunk is verified on its way, as any that is fetched.

    Args:
        runs: the chunks.
        source: name of a tier, or a tier that is only for this order, such as a peer.
        target: name of a tier.
        landed: told each chunk that is in host now for this order's sake, pinned for the call; with
            it host may be source and target.

    Attributes:
        held: keys that ``target`` has.
        nbytes: payload bytes of those that were moved for it.
        failed: reason -> chunks that it has not.

    Raises:
        ConfigError: no such tier, or both are one.
        Unsupported: the target is only read.
    """

    def __init__(
        self,
        engine: ChunkEngine,
        runs: Sequence[Run],
        *,
        source: str | RemoteTier,
        target: str,
        landed: Callable[[HostChunk], None] | None = None,
    ) -> None:
        self._engine = engine
        self._host = engine.host
        self._from = self._tier(source) if isinstance(source, str) else source
        self._to = self._tier(target)
        self._landed = landed or (lambda chunk: None)
        if self._from is self._to and not (landed and self._to is None):
            raise ConfigError(f"{source} and {target} are one tier", hint="name two tiers")
        if self._to is not None and self._to.config.write == "never":
            raise Unsupported(f"tier {target} is only read", hint="set write: through")
        self._waiting: deque[_Want] = deque()
        for run in runs:
            for at, key in enumerate(run.keys):
                parent = run.keys[at - 1] if at and run.chained else None
                self._waiting.append((key, parent, run.layout))
        self._busy: dict[bytes, float] = {}
        self._active = 0
        self.total = len(self._waiting)
        self.held: list[bytes] = []
        self.nbytes = 0
        self.failed: dict[str, int] = {}
        self.step()

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return not self._waiting and not self._active

    @property
    def at_rest(self) -> bool:
        """Whether no chunk is on its way."""
        return not self._active

    @property
    def settled(self) -> int:
        """Chunks that are decided."""
        return len(self.held) + sum(self.failed.values())

    def cancel(self) -> None:
        """Start no more; those on their way end."""
        self._fail("cancelled", len(self._waiting))
        self._waiting.clear()

    def step(self) -> None:
        """Start the next chunks."""
        for _ in range(min(len(self._waiting), AT_ONCE)):
            if not self._waiting or self._active >= AT_ONCE:
                return
            self._begin(*self._waiting.popleft())

    def _tier(self, name: str) -> RemoteTier | None:
        """None is host."""
        if name == "host":
            return None
        for tier in self._engine.tiers.readable:
            if tier.name == name:
                return tier
        names = ", ".join(["host", *(tier.name for tier in self._engine.tiers.readable)])
        raise ConfigError(f"no tier is named {name!r}", hint=f"tiers: {names}")

    def _begin(self, key: bytes, parent: bytes | None, layout: ChunkLayout) -> None:
        present = self._host.get(key)
        if present is not None and present.layout.fingerprint != layout.fingerprint:
            self._fail("layout")
        elif self._to is None and present is not None:
            self._land(present, moved=False)
        elif self._to is not None and self._to.has(key):
            self.held.append(key)
        elif self._to is not None and self._to.holds(key):
            if self._to.is_putting(key):
                self._look_again(key, parent, layout)  # it may yet fail
            else:
                self._fail("in_doubt")  # a put failed, and so did its delete
        elif present is not None:
            self._host.pin(present)
            self._active += 1
            self._store(present, self._unpin)
        elif self._from is None:
            self._fail("absent")
        elif self._to is None:
            self._fetch_to_host(self._from, key, parent, layout)
        else:
            self._pass_through(self._from, key, parent, layout)

    def _fetch_to_host(
        self, source: RemoteTier, key: bytes, parent: bytes | None, layout: ChunkLayout
    ) -> None:
        if key in self._host:
            # Somebody writes it, or it arrives for a request: it will be there, or not.
            self._look_again(key, parent, layout)
            return
        chunk = self._host.reserve(key, parent, layout)
        if chunk is None:
            self._fail("no_room")
            return

        def fetched() -> None:
            doomed = chunk.doomed
            self._host.seal(chunk)
            self._ended("cleared" if doomed else "")
            if not doomed:
                self._land(chunk, moved=True)

        self._fetch(source, chunk, fetched)

    def _look_again(self, key: bytes, parent: bytes | None, layout: ChunkLayout) -> None:
        now_s = self._engine.now_s()
        if now_s < self._busy.setdefault(key, now_s + BUSY_S):
            self._waiting.append((key, parent, layout))
        else:
            self._fail("busy")

    def _pass_through(
        self, source: RemoteTier, key: bytes, parent: bytes | None, layout: ChunkLayout
    ) -> None:
        chunk = self._host.borrow(key, parent, layout)
        if chunk is None:
            self._fail("no_room")
            return
        self._fetch(source, chunk, lambda: self._store(chunk, self._give_back))

    def _fetch(self, source: RemoteTier, chunk: HostChunk, fetched: Callable[[], None]) -> None:
        """Fill ``chunk``, then go on with ``fetched``; or free it, which ends it."""
        self._active += 1

        def settled(status: Status | None, why: str) -> None:
            if status is Status.OK:
                fetched()
                return
            if status is Status.ABANDONED:
                self._engine.lose(chunk)
            else:
                self._host.abort(chunk)
            self._ended(why or _reason(status))

        source.fetch(chunk, settled)

    def _store(self, chunk: HostChunk, free: Callable[[HostChunk, Status], None]) -> None:
        assert self._to is not None
        tier = self._to

        def stored(status: Status) -> None:
            key, nbytes = chunk.key, chunk.payload_bytes
            free(chunk, status)
            if status is Status.OK:
                self.nbytes += nbytes
                self.held.append(key)
            self._ended("" if status is Status.OK else _reason(status))

        tier.store(chunk, stored)
        tier.start_stores()

    def _unpin(self, chunk: HostChunk, status: Status) -> None:
        if status is Status.ABANDONED:
            self._engine.hold(chunk)
        else:
            self._host.unpin(chunk)

    def _give_back(self, chunk: HostChunk, status: Status) -> None:
        if status is Status.ABANDONED:
            self._engine.lose(chunk)
        else:
            self._host.abort(chunk)

    def _land(self, chunk: HostChunk, *, moved: bool) -> None:
        self._host.pin(chunk)
        self._landed(chunk)
        self._host.unpin(chunk)
        self.held.append(chunk.key)
        self.nbytes += chunk.payload_bytes if moved else 0

    def _ended(self, reason: str) -> None:
        self._active -= 1
        if reason:
            self._fail(reason)

    def _fail(self, reason: str, count: int = 1) -> None:
        if count:
            self.failed[reason] = self.failed.get(reason, 0) + count


def _reason(status: Status | None) -> str:
    if status is None:
        return "cancelled"
    return "absent" if status is Status.MISS else status.value
