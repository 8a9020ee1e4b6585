"""What the bytes of a chunk are, as far as the tiers must know."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from lmcache_core.sdk import ContractViolation, PayloadShape

_BYTES = PayloadShape(nbytes=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLayout:
    """Constant for one kind of chunk of one engine.

    Attributes:
        chunk_size: tokens in a chunk.
        payload_bytes: bytes of a whole chunk: its layers, of every worker.
        description: canonical bytes that say how the payload is laid out; two engines with
            equal descriptions can read each other's chunks.
        shape: what codecs may know of the payload; follows from the description.
        fingerprint: 16 bytes that stand for the layout in every envelope.
        encoded_fingerprint: the same for a chunk that is encoded, whose meaning also depends on
            ``shape``.
    """

    chunk_size: int
    payload_bytes: int
    description: bytes
    shape: PayloadShape = _BYTES
    fingerprint: bytes = field(init=False)
    encoded_fingerprint: bytes = field(init=False)

    def __post_init__(self) -> None:
        if not self.shape.nbytes:
            object.__setattr__(self, "shape", PayloadShape(nbytes=self.payload_bytes))
        if self.shape.nbytes != self.payload_bytes:
            raise ContractViolation(
                f"a shape of {self.shape.nbytes} bytes for {self.payload_bytes}", op="layout"
            )
        sizes = b"%d/%d/" % (self.chunk_size, self.payload_bytes)
        digest = hashlib.sha256(sizes + self.description).digest()[:16]
        object.__setattr__(self, "fingerprint", digest)
        shaped = hashlib.sha256(digest + repr(self.shape).encode()).digest()[:16]
        object.__setattr__(self, "encoded_fingerprint", shaped)
