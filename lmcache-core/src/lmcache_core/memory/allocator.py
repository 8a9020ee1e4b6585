"""Slots of an arena: a size-class allocator of offsets, without any memory of its own."""

from __future__ import annotations

from lmcache_core.sdk.errors import ConfigError, LMCacheError


class AllocatorError(LMCacheError):
    """The caller broke the allocator's rules: a double free, an unknown offset, a bad size."""


class Allocator:
    """Hands out ``[offset, offset + size)`` of a range of ``nbytes`` bytes.

    Sizes are rounded up to ``alignment``; the rounded size is the slot's class.  A freed
    slot goes on the free list of its class, so the usual alloc and free are O(1).  When the
    list is empty the slot is carved first-fit from address-ordered free extents; when none
    fits, all free lists are coalesced into extents and it is tried again.

    Not thread-safe: one owner thread.

    Args:
        nbytes: size of the range in bytes; rounded down to ``alignment``.
        alignment: of offsets and sizes, in bytes, a power of two.

    Raises:
        ConfigError: no slot fits, or the alignment is not a power of two.
    """

    __slots__ = ("_capacity_bytes", "_extents", "_free", "_live", "_mask", "_used_bytes")

    def __init__(self, nbytes: int, *, alignment: int = 4096) -> None:
        if alignment < 1 or alignment & (alignment - 1):
            raise ConfigError(f"alignment {alignment} is not a power of two", op="allocator")
        if nbytes < alignment:
            raise ConfigError(
                f"{nbytes} bytes hold no slot of {alignment} bytes",
                op="allocator",
                hint="give the host tier more memory",
            )
        self._mask = alignment - 1
        self._capacity_bytes = nbytes & ~self._mask
        self._used_bytes = 0
        self._live: dict[int, int] = {}
        self._free: dict[int, list[int]] = {}
        self._extents: list[tuple[int, int]] = [(0, self._capacity_bytes)]

    @property
    def capacity_bytes(self) -> int:
        """Bytes that can be handed out in all."""
        return self._capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of live slots, after rounding."""
        return self._used_bytes

    def alloc(self, nbytes: int) -> int | None:
        """Offset of a new slot of at least ``nbytes`` bytes, or None when none fits.

        Raises:
            AllocatorError: ``nbytes`` is not positive.
        """
        if nbytes <= 0:
            raise AllocatorError(f"a slot of {nbytes} bytes", op="alloc")
        size = (nbytes + self._mask) & ~self._mask
        slots = self._free.get(size)
        if slots:
            offset = slots.pop()
        else:
            carved = self._carve_or_coalesce(size)
            if carved is None:
                return None
            offset = carved
        self._live[offset] = size
        self._used_bytes += size
        return offset

    def free(self, offset: int) -> None:
        """Give the slot at ``offset`` back.

        Raises:
            AllocatorError: no live slot starts there (a double free or a wrong offset).
        """
        size = self._live.pop(offset, 0)
        if not size:
            raise AllocatorError(f"no live slot at offset {offset}: double free?", op="free")
        self._used_bytes -= size
        slots = self._free.get(size)
        if slots is None:
            self._free[size] = [offset]
        else:
            slots.append(offset)

    def size_of(self, offset: int) -> int:
        """Rounded size in bytes of the live slot at ``offset``.

        Raises:
            AllocatorError: no live slot starts there.
        """
        try:
            return self._live[offset]
        except KeyError:
            raise AllocatorError(f"no live slot at offset {offset}", op="size_of") from None

    def _carve_or_coalesce(self, size: int) -> int | None:
        if size > self._capacity_bytes - self._used_bytes:
            return None
        offset = self._carve(size)
        if offset is None and self._free:
            self._coalesce()
            offset = self._carve(size)
        return offset

    def _carve(self, size: int) -> int | None:
        for index, (offset, free_bytes) in enumerate(self._extents):
            if free_bytes > size:
                self._extents[index] = (offset + size, free_bytes - size)
                return offset
            if free_bytes == size:
                del self._extents[index]
                return offset
        return None

    def _coalesce(self) -> None:
        spans = [(offset, size) for size, slots in self._free.items() for offset in slots]
        spans += self._extents
        spans.sort()
        self._free.clear()
        merged: list[tuple[int, int]] = []
        for offset, size in spans:
            if merged and sum(merged[-1]) == offset:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((offset, size))
        self._extents = merged
