"""`zstd`: lossless, the bytes of elements sorted by their meaning.

An element is turned left by one bit, so that bfloat16's and float32's exponent fills its highest
byte and the sign joins the mantissa; then all highest bytes stand together, all second ones, and
so on.  Exponents compress by two to three; the mantissa's bytes hardly at all, and zstd keeps
such a block as it is at the speed of a copy.

Stream, little-endian: magic, version (2 bytes), bytes of an element (1), zero (1), bytes of the
payload (8); then for every block of `_BLOCK` elements each plane, highest byte first, as length
(4) and zstd frame.
"""

from __future__ import annotations

import struct
import threading
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmcache_core.codecs.extras import require
from lmcache_core.codecs.scratch import scratch
from lmcache_core.sdk.codec import (
    CannotDecode,
    CannotEncode,
    Codec,
    CodecInfo,
    Encoded,
    PayloadShape,
)
from lmcache_core.sdk.errors import ConfigError, ContractViolation

_NAME, _VERSION = "zstd", 1
_MAGIC = b"LMCZ"
_HEADER = struct.Struct("<4sHBBQ")
_LENGTH = struct.Struct("<I")
_BLOCK = 1 << 19
"""Elements whose planes stay in the cache between their steps; tables of zstd adapt far below."""
_LEVEL = 1
"""Entropy coding alone does the work: level 3 is slower and larger on exponents."""
_UNSIGNED: dict[int, np.dtype[Any]] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}


class Zstd(Codec):
    """Lossless; see the module.  Thread-safe: a thread has contexts of its own."""

    info = CodecInfo(name=_NAME, version=_VERSION, lossless=True)

    def __init__(self) -> None:
        require("zstandard", _NAME)
        self._own = threading.local()

    def prepare(self) -> None:
        _library()

    def encode_into(
        self, source: memoryview, target: memoryview, *, shape: PayloadShape, level: str = ""
    ) -> Encoded:
        if level not in self.info.levels:
            raise ContractViolation(f"no level {level!r}", backend=_NAME, op="encode")
        _check_length(source, shape, "encode")
        if not shape.nbytes:
            raise CannotEncode("size", "nothing to encode", codec=_NAME)
        size = _element_bytes(shape)
        room = min(len(target), shape.nbytes - 1)
        if room < _HEADER.size:
            raise CannotEncode("size", codec=_NAME)
        _HEADER.pack_into(target, 0, _MAGIC, _VERSION, size, 0, shape.nbytes)
        at = _HEADER.size
        compressor = self._context("ZstdCompressor", level=_LEVEL)
        elements = np.frombuffer(source, _UNSIGNED[size])
        for first in range(0, len(elements), _BLOCK):
            for plane in _split(elements[first : first + _BLOCK]):
                frame = compressor.compress(plane)
                end = at + _LENGTH.size + len(frame)
                if end > room:
                    raise CannotEncode("size", codec=_NAME)
                _LENGTH.pack_into(target, at, len(frame))
                target[at + _LENGTH.size : end] = frame
                at = end
        return Encoded(at)

    def decode_into(self, source: memoryview, target: memoryview, *, shape: PayloadShape) -> None:
        _check_length(target, shape, "decode")
        size = _element_bytes(shape)
        _check_header(source, size, shape.nbytes)
        at = _HEADER.size
        elements = np.frombuffer(target, _UNSIGNED[size]) if shape.nbytes else np.empty(0)
        for first in range(0, len(elements), _BLOCK):
            part = elements[first : first + _BLOCK]
            planes = []
            for _ in range(size):
                plane, at = self._plane(source, at, len(part))
                planes.append(plane)
            _merge(planes, part)
        if at != len(source):
            raise _damaged("more than its planes")

    def _plane(self, source: memoryview, at: int, nbytes: int) -> tuple[NDArray[np.uint8], int]:
        """A plane of ``nbytes``, and where the next one is."""
        begin = at + _LENGTH.size
        if begin > len(source):
            raise _damaged("cut")
        end = begin + int(_LENGTH.unpack_from(source, at)[0])
        if end > len(source):
            raise _damaged("cut")
        library = _library()
        frame = source[begin:end]
        try:
            # The size is the frame's own claim: checked before memory is taken by it.
            if library.frame_content_size(frame) != nbytes:
                raise _damaged("a plane of another size")
            plain = self._context("ZstdDecompressor").decompress(frame, allow_extra_data=False)
        except library.ZstdError as error:
            raise _damaged(str(error)) from None
        if len(plain) != nbytes:
            raise _damaged("a plane of another size")
        return np.frombuffer(plain, np.uint8), end

    def _context(self, kind: str, **options: int) -> Any:
        context = getattr(self._own, kind, None)
        if context is None:
            context = getattr(_library(), kind)(**options)
            setattr(self._own, kind, context)
        return context


def _library() -> ModuleType:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(
            f"codec zstd needs zstandard: {error}",
            backend=_NAME,
            op="prepare",
            hint="pip install 'lmcache-core[zstd]'",
        ) from error
    return zstandard  # type: ignore[no-any-return]


def _element_bytes(shape: PayloadShape) -> int:
    """1 where the payload is not a whole number of elements."""
    return shape.element_bytes if shape.nbytes % shape.element_bytes == 0 else 1


def _split(elements: NDArray[Any]) -> list[NDArray[np.uint8]]:
    """Planes of elements, highest byte first; those of one-byte elements are they."""
    size = elements.itemsize
    if size == 1:
        return [elements]
    turned = scratch("turned", elements.shape, elements.dtype)
    spare = scratch("spare", elements.shape, elements.dtype)
    np.left_shift(elements, 1, out=turned)
    np.right_shift(elements, 8 * size - 1, out=spare)
    np.bitwise_or(turned, spare, out=turned)
    planes = []
    for i in range(size):
        plane = scratch(f"plane {i}", elements.shape, np.uint8)
        np.right_shift(turned, 8 * (size - 1 - i), out=spare)
        np.copyto(plane, spare, casting="unsafe")  # its lowest byte
        planes.append(plane)
    return planes


def _merge(planes: list[NDArray[np.uint8]], elements: NDArray[Any]) -> None:
    """The reverse of `_split`."""
    size = elements.itemsize
    if size == 1:
        np.copyto(elements, planes[0])
        return
    turned = scratch("turned", elements.shape, elements.dtype)
    spare = scratch("spare", elements.shape, elements.dtype)
    np.copyto(turned, planes[0])
    for plane in planes[1:]:
        np.left_shift(turned, 8, out=turned)
        np.bitwise_or(turned, plane, out=turned)
    np.left_shift(turned, 8 * size - 1, out=spare)
    np.right_shift(turned, 1, out=turned)
    np.bitwise_or(turned, spare, out=elements)


def _check_header(source: memoryview, size: int, nbytes: int) -> None:
    if len(source) < _HEADER.size or bytes(source[:4]) != _MAGIC:
        raise _damaged("not a stream of this codec")
    _, version, found_size, _, found = _HEADER.unpack_from(source)
    if version != _VERSION:
        raise CannotDecode("version", f"stream of version {version}, not {_VERSION}", codec=_NAME)
    if (found_size, found) != (size, nbytes):
        raise _damaged("a stream of another shape")


def _check_length(payload: memoryview, shape: PayloadShape, op: str) -> None:
    if payload.nbytes != shape.nbytes:
        raise ContractViolation(
            f"payload of {payload.nbytes} bytes for a shape of {shape.nbytes}",
            backend=_NAME,
            op=op,
        )


def _damaged(message: str) -> CannotDecode:
    return CannotDecode("stream", message, codec=_NAME)
