"""Who holds what: every chunk of every instance, in memory.

A chunk's holders are one number: 8 bits an instance, one a tier.  So a prefix costs one look-up a
chunk, however many instances there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lmcache_core.agent.wire import MAX_TIERS
from lmcache_core.keys import TAG_BYTES

SLICE = 4096
"""Chunks that are handled before others get a turn: about 2 ms."""
_BLOCK = 1024
_MAX_SHARED_MASKS = 65_536


class TooManyChunks(Exception):
    """A limit of the directory is reached; the message says which."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one instance has of a prefix without a gap, and how much of that each tier has."""

    slot: int
    chunks: int
    tiers: tuple[int, ...]


@dataclass(slots=True)
class _Slot:
    keys: set[bytes] = field(default_factory=set)
    tiers: list[int] = field(default_factory=lambda: [0] * MAX_TIERS)


class Directory:
    """Belongs to one event loop; what is async gives others a turn every `SLICE` chunks.

    An instance has a slot, from `join` to `leave`.
    """

    def __init__(self, *, max_chunks: int, max_chunks_per_instance: int) -> None:
        self._max_chunks = max_chunks
        self._max_per_instance = max_chunks_per_instance
        self._masks: dict[bytes, int] = {}
        self._shared: dict[int, int] = {}
        self._slots: dict[int, _Slot] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        """Chunks that differ."""
        return len(self._masks)

    def join(self) -> int:
        """A slot for another instance, which holds nothing."""
        slot = self._free.pop() if self._free else len(self._slots)
        self._slots[slot] = _Slot()
        return slot

    async def leave(self, slot: int) -> None:
        """Forget an instance; its slot may be given to another."""
        await self.clear(slot)
        del self._slots[slot]
        self._free.append(slot)

    def chunks(self, slot: int, tier: int | None = None) -> int:
        """Chunks of an instance, or of one of its tiers."""
        held = self._slots[slot]
        return len(held.keys) if tier is None else held.tiers[tier]

    async def add(self, slot: int, tier: int, keys: Sequence[bytes]) -> None:
        """``keys`` are in the tier.

        Raises:
            TooManyChunks: some of them were added, the others not.
        """
        for start in range(0, len(keys), SLICE):
            if start:
                await asyncio.sleep(0)
            self._add(slot, tier, keys[start : start + SLICE])

    async def remove(self, slot: int, tier: int, keys: Sequence[bytes]) -> None:
        """``keys`` are not in the tier any more; unknown ones are fine."""
        for start in range(0, len(keys), SLICE):
            if start:
                await asyncio.sleep(0)
            self._remove(slot, tier, keys[start : start + SLICE])

    async def clear(self, slot: int) -> None:
        """An instance holds nothing."""
        held = self._slots[slot]
        gone, held.keys, held.tiers = held.keys, set(), [0] * MAX_TIERS
        clear_mask = ~(0xFF << (MAX_TIERS * slot))
        count = 0
        while gone:
            count += 1
            if count % SLICE == 0:
                await asyncio.sleep(0)
            key = gone.pop()
            mask = self._masks.get(key, 0)
            left = mask & clear_mask
            if left:
                self._masks[key] = self._share(left)
            elif mask:
                del self._masks[key]

    def prefix(self, keys: Sequence[bytes]) -> list[Run]:
        """Every instance that has the first of ``keys``, longest first."""
        width = max(self._slots, default=-1) + 1
        if not width:
            return []
        alive = np.ones(width, dtype=bool)
        chunks = np.zeros(width, dtype=np.int64)
        tiers = np.zeros((MAX_TIERS, width), dtype=np.int64)
        for start in range(0, len(keys), _BLOCK):
            rows = self._rows(keys[start : start + _BLOCK], width)
            grid = np.frombuffer(rows, dtype=np.uint8).reshape(-1, width)
            held = np.logical_and.accumulate(grid != 0, axis=0) & alive
            chunks += held.sum(axis=0)
            seen = np.flatnonzero(held.any(axis=0))
            counted = grid[:, seen] * held[:, seen]
            for tier in range(MAX_TIERS):
                tiers[tier, seen] += ((counted >> tier) & 1).sum(axis=0, dtype=np.int64)
            if len(held) < _BLOCK or not held[-1].any():
                break
            alive = held[-1]
        found = [
            Run(int(slot), int(chunks[slot]), tuple(int(n) for n in tiers[:, slot]))
            for slot in np.flatnonzero(chunks)
        ]
        return sorted(found, key=lambda run: (-run.chunks, run.slot))

    def holders(self, keys: Sequence[bytes], slots: Collection[int], tier: int) -> list[list[int]]:
        """For each key, those of ``slots`` that have it in ``tier``."""
        bits = {slot: 1 << (MAX_TIERS * slot + tier) for slot in slots}
        wanted = sum(bits.values())
        known: dict[int, list[int]] = {0: []}
        found = []
        for key in keys:
            mask = self._masks.get(key, 0) & wanted
            if mask not in known:
                known[mask] = [slot for slot, bit in bits.items() if mask & bit]
            found.append(known[mask])
        return found

    def among(self, slot: int, tier: int, keys: Iterable[bytes]) -> list[bytes]:
        """Those of ``keys`` that the instance has in the tier, in their order."""
        bit = 1 << (MAX_TIERS * slot + tier)
        return [key for key in keys if self._masks.get(key, 0) & bit]

    async def of_tags(self, slot: int, tier: int, tags: Collection[bytes] | None) -> list[bytes]:
        """Keys of these namespaces (None: of all) that the instance has in the tier."""
        bit = 1 << (MAX_TIERS * slot + tier)
        everything = list(self._slots[slot].keys)
        found: list[bytes] = []
        for start in range(0, len(everything), SLICE):
            await asyncio.sleep(0)
            found += (
                key
                for key in everything[start : start + SLICE]
                if (tags is None or key[:TAG_BYTES] in tags) and self._masks.get(key, 0) & bit
            )
        return found

    def _rows(self, keys: Sequence[bytes], width: int) -> bytes:
        rows = []
        for key in keys:
            mask = self._masks.get(key)
            if mask is None:
                break
            rows.append(mask.to_bytes(width, "little"))
        return b"".join(rows)

    def _add(self, slot: int, tier: int, keys: Sequence[bytes]) -> None:
        masks, held = self._masks, self._slots[slot]
        most = self._max_per_instance
        if len(held.keys) + len(keys) > most and len(held.keys.union(keys)) > most:
            raise TooManyChunks(f"more than {most} chunks of one instance")
        bit = 1 << (MAX_TIERS * slot + tier)
        shared = self._shared
        added = 0
        for key in keys:
            mask = masks.get(key, 0)
            if mask & bit:
                continue
            if not mask and len(masks) >= self._max_chunks:
                held.tiers[tier] += added
                raise TooManyChunks(f"more than {self._max_chunks} chunks of all instances")
            mask |= bit
            masks[key] = shared.setdefault(mask, mask)
            held.keys.add(key)
            added += 1
        held.tiers[tier] += added
        if len(shared) > _MAX_SHARED_MASKS:
            shared.clear()

    def _remove(self, slot: int, tier: int, keys: Sequence[bytes]) -> None:
        masks, held = self._masks, self._slots[slot]
        bit = 1 << (MAX_TIERS * slot + tier)
        ours = 0xFF << (MAX_TIERS * slot)
        for key in keys:
            mask = masks.get(key, 0)
            if not mask & bit:
                continue
            mask ^= bit
            held.tiers[tier] -= 1
            if not mask & ours:
                held.keys.discard(key)
            if mask:
                masks[key] = self._share(mask)
            else:
                del masks[key]

    def _share(self, mask: int) -> int:
        # Most chunks have one of few masks: a number each would be as large as the key.
        return self._shared.setdefault(mask, mask)
