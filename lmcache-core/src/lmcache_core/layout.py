"""What the bytes of a chunk are, as far as the tiers must know."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLayout:
    """Constant for one kind of chunk of one engine.

    Attributes:
        chunk_size: tokens in a chunk.
        payload_bytes: bytes of a whole chunk: its layers, of every worker.
        description: canonical bytes that say how the payload is laid out; two engines with
            equal descriptions can read each other's chunks.
        fingerprint: 16 bytes that stand for the layout in every envelope.
    """

    chunk_size: int
    payload_bytes: int
    description: bytes
    fingerprint: bytes = field(init=False)

    def __post_init__(self) -> None:
        sizes = b"%d/%d/" % (self.chunk_size, self.payload_bytes)
        digest = hashlib.sha256(sizes + self.description).digest()[:16]
        object.__setattr__(self, "fingerprint", digest)
