"""What the bytes of a chunk are, as far as the tiers must know."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLayout:
    """Constant for one engine.

    Attributes:
        chunk_size: tokens in a chunk.
        payload_bytes: bytes of a whole chunk, all layers of this worker.
        description: canonical bytes that say how the payload is laid out; two engines with
            equal descriptions can read each other's chunks.
    """

    chunk_size: int
    payload_bytes: int
    description: bytes

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that stand for the layout in every envelope."""
        sizes = b"%d/%d/" % (self.chunk_size, self.payload_bytes)
        return hashlib.sha256(sizes + self.description).digest()[:16]
