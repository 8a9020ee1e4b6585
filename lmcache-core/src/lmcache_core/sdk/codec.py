"""Codecs: how a chunk is made smaller on its way to a tier, and whole again on its way back.

A distribution offers one as an entry point of the group ``lmcache.codecs.v1``: the entry's name
is the codec's, its object a class that is made without arguments.  The name stands in every
chunk's header, so a reader that has the codec installed needs no configuration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from lmcache_core.sdk.errors import ContractViolation, LMCacheError

CODEC_API_VERSION: tuple[int, int] = (1, 0)
"""Version of the contract of codecs."""
CODEC_GROUP = "lmcache.codecs.v1"
"""Entry-point group of codecs; the entry's name is the codec's name."""

ELEMENT_BYTES: Mapping[str, int] = MappingProxyType({"bfloat16": 2, "float16": 2, "float32": 4})
"""Element types that codecs are told of; any other payload has ``dtype`` ""."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVTensor:
    """One strided array of keys or values inside a payload.

    Its axes are ``(layers, blocks, block_tokens, heads, head_size)``; tokens in order are blocks
    first, then the tokens of a block.

    Attributes:
        role: ``"key"`` or ``"value"``.
        offset_bytes: of its first element in the payload.
        shape: five sizes, each at least 1.
        strides_bytes: five, each a positive multiple of the element's size.
    """

    role: str
    offset_bytes: int
    shape: tuple[int, int, int, int, int]
    strides_bytes: tuple[int, int, int, int, int]

    @property
    def elements(self) -> int:
        """How many values it has."""
        layers, blocks, block_tokens, heads, head_size = self.shape
        return layers * blocks * block_tokens * heads * head_size


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadShape:
    """What the bytes of a payload are, as far as its engine's adapter knows.

    Attributes:
        nbytes: length of the payload.
        dtype: of its elements, a key of `ELEMENT_BYTES`; "" where it is not known.
        tensors: arrays that together are the whole payload, each element once; empty where the
            axes are not known.

    Raises:
        ContractViolation: a tensor reaches outside of the payload or lies over itself, or they
            have not as many elements as it.  Codecs may trust that every element lies inside;
            that two tensors do not lie over each other is the adapter's word.
    """

    nbytes: int
    dtype: str = ""
    tensors: tuple[KVTensor, ...] = ()
    element_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        if self.dtype and self.dtype not in ELEMENT_BYTES:
            raise ContractViolation(f"unknown element type {self.dtype!r}", op="shape")
        size = ELEMENT_BYTES.get(self.dtype, 1)
        object.__setattr__(self, "element_bytes", size)
        if self.tensors and not self.dtype:
            raise ContractViolation("tensors without an element type", op="shape")
        for tensor in self.tensors:
            _check_tensor(tensor, self.nbytes, size)
        total = sum(tensor.elements for tensor in self.tensors) * size
        if self.tensors and total != self.nbytes:
            raise ContractViolation(
                f"tensors of {total} bytes in a payload of {self.nbytes}", op="shape"
            )


def _check_tensor(tensor: KVTensor, nbytes: int, size: int) -> None:
    lengths, strides = tensor.shape, tensor.strides_bytes
    fits = len(lengths) == len(strides) == 5 and min(lengths) >= 1 and tensor.offset_bytes >= 0
    fits = fits and tensor.role in ("key", "value") and tensor.offset_bytes % size == 0
    if not fits or any(stride < size or stride % size for stride in strides):
        raise ContractViolation(f"not an array of elements: {tensor}", op="shape")
    inner = size
    for stride, length in sorted(zip(strides, lengths)):
        if length > 1 and stride < inner:
            raise ContractViolation(f"an array that lies over itself: {tensor}", op="shape")
        inner = max(inner, stride * length)
    last = sum(stride * (length - 1) for stride, length in zip(strides, lengths))
    if tensor.offset_bytes + last + size > nbytes:
        raise ContractViolation(f"an array outside of its payload: {tensor}", op="shape")


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecInfo:
    """What a codec is.

    Attributes:
        name: equal to its entry point's; ASCII, up to 32 bytes.
        version: of its stream.  A codec says in its own stream what wrote it.
        lossless: what is decoded is what was encoded, bit for bit.
        needs_axes: refuses a payload whose ``tensors`` are not known.
        levels: by how strongly they compress, weakest first; ``("",)`` for a codec without.
        default_level: one of them.
        max_error: level -> the largest error, as `Codec.encode_into` measures it, that it lets
            pass; empty for a lossless codec.
        api_min: lowest `CODEC_API_VERSION` that it runs with.
    """

    name: str
    version: int
    lossless: bool
    needs_axes: bool = False
    levels: tuple[str, ...] = ("",)
    default_level: str = ""
    max_error: Mapping[str, float] = field(default_factory=dict)
    api_min: tuple[int, int] = CODEC_API_VERSION


class Encoded(NamedTuple):
    """An encoded payload.

    Attributes:
        nbytes: how much of the target it takes.
        error: measured; 0.0 for a lossless codec.
    """

    nbytes: int
    error: float = 0.0


class CannotEncode(LMCacheError):
    """This payload is not for this codec; core stores it in another way.

    Attributes:
        reason: ``"axes"`` not known, ``"dtype"``, ``"nonfinite"`` values, ``"bound"`` would be
            passed, ``"size"`` would not shrink.
    """

    def __init__(self, reason: str, message: str = "", *, codec: str = "") -> None:
        super().__init__(message or reason, backend=codec, op="encode")
        self.reason = reason


class CannotDecode(LMCacheError):
    """The stream is not one of this codec, or is damaged, or is of another version.

    Attributes:
        reason: ``"stream"`` or ``"version"``.
    """

    def __init__(self, reason: str, message: str = "", *, codec: str = "") -> None:
        super().__init__(message or reason, backend=codec, op="decode")
        self.reason = reason


class Codec(ABC):
    """One codec.  Thread-safe; long work releases the interpreter's lock; keeps no reference to
    a buffer after a call.  Making one raises ConfigError, with the command that installs it, where
    something that it needs is missing, and imports nothing heavy."""

    info: CodecInfo

    def prepare(self) -> None:
        """Load and compile what the first call would otherwise wait for; may take seconds.

        Raises:
            ConfigError: something is missing; the hint is the command that installs it.
        """
        return

    @abstractmethod
    def encode_into(
        self, source: memoryview, target: memoryview, *, shape: PayloadShape, level: str = ""
    ) -> Encoded:
        """Encode all of ``source`` into the start of ``target``.

        The error of a lossy codec is measured on what `decode_into` would give: over every layer
        of every tensor, the root mean square of the differences divided by that of the values;
        the largest of these.  A layer of zeros must come back as zeros.

        Args:
            source: read-only bytes, ``shape.nbytes`` long.
            target: writable bytes, of any length; what is not used is left undefined.
            level: one of ``info.levels``; "" is the default one.

        Raises:
            CannotEncode: see there; ``"size"`` when ``target`` is too short.  ``target`` is
                undefined.
        """

    @abstractmethod
    def decode_into(self, source: memoryview, target: memoryview, *, shape: PayloadShape) -> None:
        """Decode all of ``source`` into all of ``target``, ``shape.nbytes`` long.

        The bytes may be anything: no input may make it crash, touch memory outside of
        ``target``, or take more time or memory than a valid stream of this shape would.

        Raises:
            CannotDecode: not a stream of this codec and shape; ``target`` is undefined.
        """
