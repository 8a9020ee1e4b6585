"""How much of a tier each namespace takes; of those with a limit also who goes first.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import NamedTuple

from lmcache_core.keys import TAG_BYTES
from lmcache_core.policy.lru import Lru


class Taken(NamedTuple):
    """What one namespace takes."""

    tag: bytes
    chunks: int
    nbytes: int


class Shares:
    """By the tag of each key.  One owner thread.

    A key is resident from `add` to `remove`; `count` alone counts bytes that are or may be there.
    """

    def __init__(self) -> None:
        self._chunks: dict[bytes, int] = {}
        self._nbytes: dict[bytes, int] = {}
        self._limits: dict[bytes, int] = {}
        self._order: dict[bytes, Lru] = {}
        self._over: set[bytes] = set()

    @property
    def over(self) -> bool:
        """Whether some namespace may have more than its limit."""
        return bool(self._over)

    def count(self, key: bytes, change_bytes: int, change_chunks: int = 0) -> None:
        """The namespace of ``key`` takes so much more, or less."""
        tag = key[:TAG_BYTES]
        nbytes = self._nbytes.get(tag, 0) + change_bytes
        chunks = self._chunks.get(tag, 0) + change_chunks
        if nbytes or chunks:
            self._nbytes[tag], self._chunks[tag] = nbytes, chunks
        else:
            self._nbytes.pop(tag, None)
            self._chunks.pop(tag, None)
        if self._limits and nbytes > self._limits.get(tag, nbytes):
            self._over.add(tag)

    def add(self, key: bytes, parent: bytes | None) -> None:
        """``key`` may be evicted from now on, last of all."""
        order = self._order.get(key[:TAG_BYTES])
        if order is not None:
            order.add(key, parent)

    def remove(self, key: bytes) -> None:
        """``key`` may not be evicted any more; absent is fine."""
        order = self._order.get(key[:TAG_BYTES])
        if order is not None:
            order.remove(key)

    def touch(self, keys_in_prefix_order: Sequence[bytes]) -> None:
        """The prefix was used."""
        if self._order and keys_in_prefix_order:
            order = self._order.get(keys_in_prefix_order[0][:TAG_BYTES])
            if order is not None:
                order.touch(keys_in_prefix_order)

    def limit(
        self,
        limits: Mapping[bytes, int],
        resident: Callable[[], Iterable[tuple[bytes, bytes | None]]],
    ) -> None:
        """From now on these ``limits`` hold, in bytes by tag, and no others.

        Args:
            resident: key and parent of every chunk that may be evicted, in order of use; asked
                once, and only when a tag is new.
        """
        self._limits = dict(limits)
        new = {tag: Lru() for tag in limits if tag not in self._order}
        kept = {tag: order for tag, order in self._order.items() if tag in limits}
        self._order = kept | new
        for key, parent in resident() if new else ():
            order = new.get(key[:TAG_BYTES])
            if order is not None:
                order.add(key, parent)
        self._over = {tag for tag in limits if self.surplus(tag) > 0}

    def surplus(self, tag: bytes) -> int:
        """Bytes over the limit of ``tag``; below 0 is room, and 0 without a limit."""
        limit = self._limits.get(tag)
        return 0 if limit is None else self._nbytes.get(tag, 0) - limit

    def take_over(self) -> list[bytes]:
        """Tags that are over their limit; each is told once, until more is added."""
        found = [tag for tag in self._over if self.surplus(tag) > 0]
        self._over.clear()
        return found

    def again(self, tag: bytes) -> None:
        """``tag`` could not be brought below its limit yet."""
        self._over.add(tag)

    def victims(
        self, tag: bytes, evictable: Callable[[bytes], bool]
    ) -> Generator[bytes, None, None]:
        """As `Lru.victims`, of one limited tag."""
        return self._order[tag].victims(evictable)

    def largest(self, limit: int) -> list[Taken]:
        """The namespaces that take most, at most ``limit`` of them."""
        most = sorted(self._nbytes, key=self._nbytes.__getitem__, reverse=True)[:limit]
        return [Taken(tag, self._chunks.get(tag, 0), self._nbytes[tag]) for tag in most]
