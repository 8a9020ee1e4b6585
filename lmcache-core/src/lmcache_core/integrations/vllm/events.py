"""KV cache events for routers: which tier holds which chunk, through vLLM's publisher.

A block of these events is one of our chunks: ``block_hashes`` are the 32-byte prefix digests
of `lmcache_core.keys`, ``block_size`` is the chunk size, ``token_ids`` and the parent's hash
come along, so a consumer can follow them without knowing how they are made.  Host is medium
``CPU``; every tier below is ``STORAGE`` with the tier's name as ``ownership``.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from vllm.distributed.kv_events import (
    MEDIUM_CPU,
    MEDIUM_STORAGE,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
)

from lmcache_core.integrations.vllm.lookups import Tracked
from lmcache_core.keys import split_key

_Chunk = tuple[bytes | None, list[int], str | None]


class KvEvents:
    """Collects events until vLLM takes them; bounded.  Scheduler's thread only.

    Args:
        max_buffered: events that are kept, and chunks whose tokens are remembered.
        dropped: counts events that found no room, or whose tokens were forgotten.
    """

    def __init__(
        self, *, chunk_size: int, max_buffered: int, dropped: Callable[[int], None]
    ) -> None:
        self._chunk_size = chunk_size
        self._max_buffered = max_buffered
        self._dropped = dropped
        self._known: OrderedDict[bytes, _Chunk] = OrderedDict()
        self._events: deque[Any] = deque()

    def saw(self, tracked: Tracked, before: int) -> None:
        """Remember the tokens of a request's chunks from number ``before`` on."""
        size = self._chunk_size
        lora = tracked.request.lora_request
        for i in range(before, len(tracked.keys)):
            parent = split_key(tracked.keys[i - 1]).digest if i else None
            tokens = list(tracked.request.all_token_ids[i * size : (i + 1) * size])
            self._known[tracked.keys[i]] = (parent, tokens, lora.lora_name if lora else None)
            self._known.move_to_end(tracked.keys[i])
        while len(self._known) > self._max_buffered:
            self._known.popitem(last=False)

    def changed(self, tier: str, key: bytes, present: bool) -> None:
        """``tier`` holds ``key`` now, or no longer."""
        medium = MEDIUM_CPU if tier == "host" else MEDIUM_STORAGE
        owner = None if tier == "host" else tier
        digest = split_key(key).digest
        if not present:
            self._add(BlockRemoved(block_hashes=[digest], medium=medium, ownership=owner))
            return
        chunk = self._known.get(key)
        if chunk is None:
            self._dropped(1)
            return
        parent, tokens, lora_name = chunk
        self._add(
            BlockStored(
                block_hashes=[digest],
                parent_block_hash=parent,
                token_ids=tokens,
                block_size=self._chunk_size,
                lora_id=None,
                medium=medium,
                lora_name=lora_name,
                ownership=owner,
            )
        )

    def cleared(self) -> None:
        """Nothing that was stored before is served any more."""
        self._events.clear()
        self._add(AllBlocksCleared())

    def take(self) -> list[Any]:
        """What happened since the last call."""
        taken = list(self._events)
        self._events.clear()
        return taken

    def _add(self, event: Any) -> None:
        if len(self._events) >= self._max_buffered:
            self._dropped(1)
            return
        self._events.append(event)
