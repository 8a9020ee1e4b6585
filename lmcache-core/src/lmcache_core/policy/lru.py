"""Least recently used, leaves first: evicts the tail of a prefix chain before its head."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Iterator, Sequence

from lmcache_core.sdk.errors import ContractViolation


class _Node:
    __slots__ = ("key", "parent", "queued", "seq")

    def __init__(self, key: bytes, parent: bytes | None) -> None:
        self.key = key
        self.parent = parent
        self.seq = 0
        self.queued = False


class Lru:
    """Order of eviction of resident keys.  Pure bookkeeping; one owner thread.

    A key with resident children is never a victim, whatever its age, so a suffix is never
    orphaned.  Recency is a sequence number, so add and touch are O(1); keys without
    children wait in a heap whose entries are brought up to date when they reach its top,
    so a victim costs O(log n), however many keys are pinned down by children.
    """

    def __init__(self) -> None:
        self._nodes: dict[bytes, _Node] = {}
        self._children: dict[bytes, int] = {}
        self._heap: list[tuple[int, _Node]] = []
        self._seq = 0

    def __contains__(self, key: object) -> bool:
        return key in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[bytes]:
        """Every resident key, in no order."""
        return iter(self._nodes)

    def resident(self) -> list[bytes]:
        """Every resident key, longest unused first."""
        return sorted(self._nodes, key=lambda key: self._nodes[key].seq)

    def last_use(self, key: bytes) -> int:
        """A number that grows with every use of a resident ``key``, and from key to key.

        Raises:
            KeyError: it is not resident.
        """
        return self._nodes[key].seq

    def add(self, key: bytes, parent: bytes | None) -> None:
        """Make ``key`` resident and the most recent; a present key is touched.

        Args:
            key: identity of the chunk.
            parent: the chunk before it in its prefix, None for the first.  It need not be
                resident; once it is, ``key`` protects it.

        Raises:
            ContractViolation: a key is its own parent.
        """
        if key == parent:
            raise ContractViolation("a key can't be its own parent", op="lru.add")
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = _Node(key, None)
        if node.parent != parent:
            self._unlink(node)
            node.parent = parent
            if parent is not None:
                self._children[parent] = self._children.get(parent, 0) + 1
        self._bump(node)
        self._queue(node)

    def touch(self, keys_in_prefix_order: Sequence[bytes]) -> None:
        """Make the keys the most recent, each more recent than those after it.

        Absent keys are ignored.
        """
        for key in reversed(keys_in_prefix_order):
            node = self._nodes.get(key)
            if node is not None:
                self._bump(node)

    def remove(self, key: bytes) -> None:
        """Forget ``key``; absent is fine.  Its parent may become a victim."""
        node = self._nodes.pop(key, None)
        if node is None:
            return
        self._unlink(node)
        if len(self._heap) > 2 * len(self._nodes) + 64:
            self._heap = [entry for entry in self._heap if self._is_live(entry[1])]
            heapq.heapify(self._heap)

    def victims(self, evictable: Callable[[bytes], bool]) -> Generator[bytes, None, None]:
        """Keys to evict, oldest first; each is to be removed before the next is asked for.

        Only keys without resident children for which ``evictable`` is true.  A parent
        follows, at its own age, once its last child was yielded and removed.  A key that
        was yielded but not removed is not yielded again by this iterator.  Keys may be
        added, touched and removed meanwhile; close the iterator before starting another.
        """
        skipped: list[_Node] = []
        try:
            while self._heap:
                seq, node = heapq.heappop(self._heap)
                node.queued = False
                if not self._is_live(node) or node.key in self._children:
                    continue
                if seq != node.seq:
                    self._queue(node)
                    continue
                # Out of the heap until the iterator ends, so it can't come up again.
                node.queued = True
                skipped.append(node)
                if evictable(node.key):
                    yield node.key
        finally:
            for node in skipped:
                node.queued = False
                if self._is_live(node):
                    self._queue(node)

    def _is_live(self, node: _Node) -> bool:
        return self._nodes.get(node.key) is node

    def _bump(self, node: _Node) -> None:
        self._seq += 1
        node.seq = self._seq

    def _queue(self, node: _Node) -> None:
        if not node.queued and node.key not in self._children:
            node.queued = True
            heapq.heappush(self._heap, (node.seq, node))

    def _unlink(self, node: _Node) -> None:
        parent = node.parent
        if parent is None:
            return
        node.parent = None
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
            return
        del self._children[parent]
        parent_node = self._nodes.get(parent)
        if parent_node is not None:
            self._queue(parent_node)
