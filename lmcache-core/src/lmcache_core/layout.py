"""What the bytes of a chunk are, as far as the tiers must know."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from msgspec import Meta

from lmcache_core.sdk import ContractViolation, KVTensor, PayloadShape

MAX_TENSORS = 4096
MAX_DESCRIPTION_BYTES = 64 << 10
_Number = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Text = Annotated[str, Meta(max_length=4096)]
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


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """A `lmcache_core.sdk.KVTensor` on the wire."""

    role: _Text
    offset_bytes: _Number
    shape: tuple[_Number, _Number, _Number, _Number, _Number]
    strides_bytes: tuple[_Number, _Number, _Number, _Number, _Number]


class LayoutSpec(msgspec.Struct, frozen=True, array_like=True):
    """A `ChunkLayout` on the wire."""

    chunk_size: Annotated[int, Meta(gt=0, le=1 << 31)]
    payload_bytes: Annotated[int, Meta(gt=0, le=1 << 48)]
    description: Annotated[bytes, Meta(max_length=MAX_DESCRIPTION_BYTES)]
    dtype: _Text = ""
    tensors: Annotated[tuple[TensorSpec, ...], Meta(max_length=MAX_TENSORS)] = ()

    @classmethod
    def of(cls, layout: ChunkLayout) -> LayoutSpec:
        """What is said of ``layout``."""
        return cls(
            layout.chunk_size,
            layout.payload_bytes,
            layout.description,
            layout.shape.dtype,
            tuple(
                TensorSpec(t.role, t.offset_bytes, t.shape, t.strides_bytes)
                for t in layout.shape.tensors
            ),
        )

    def layout(self) -> ChunkLayout:
        """The layout that is meant.

        Raises:
            ContractViolation: its tensors are not the payload.
        """
        tensors = tuple(
            KVTensor(
                role=t.role,
                offset_bytes=t.offset_bytes,
                shape=t.shape,
                strides_bytes=t.strides_bytes,
            )
            for t in self.tensors
        )
        return ChunkLayout(
            chunk_size=self.chunk_size,
            payload_bytes=self.payload_bytes,
            description=self.description,
            shape=PayloadShape(nbytes=self.payload_bytes, dtype=self.dtype, tensors=tensors),
        )
