"""The codec family judges itself: right codecs pass, each wrong one is found by the check that is
meant for it."""

from __future__ import annotations

import ctypes
import os
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lmcache_conformance import CodecConformance
from lmcache_conformance.cli import app
from lmcache_conformance.codecs import CODEC_CHECKS, judge_codec
from lmcache_conformance.codecs.payloads import error_of
from lmcache_core.sdk import CannotDecode, CannotEncode, Codec, CodecInfo, Encoded, PayloadShape

_HEADER = struct.Struct("<4sQB3xI")
_TYPES = {"": 0, "bfloat16": 1, "float16": 2, "float32": 3}


class Right(Codec):
    """Lossless: a header, then zlib."""

    info = CodecInfo(name="right", version=1, lossless=True)

    def encode_into(
        self, source: memoryview, target: memoryview, *, shape: PayloadShape, level: str = ""
    ) -> Encoded:
        if not shape.nbytes:
            raise CannotEncode("size")
        packed = zlib.compress(self.kept(source, shape, level), 1)
        stream = self.header(shape, packed) + packed
        if len(stream) > len(target):
            raise CannotEncode("size")
        target[: len(stream)] = stream
        return Encoded(len(stream), self.error(source, shape, level))

    def decode_into(self, source: memoryview, target: memoryview, *, shape: PayloadShape) -> None:
        if len(source) < _HEADER.size:
            raise CannotDecode("stream")
        magic, nbytes, kind, length = _HEADER.unpack_from(source)
        if magic != b"TEST" or (nbytes, kind) != (shape.nbytes, _TYPES[shape.dtype]):
            raise CannotDecode("stream")
        if len(source) != _HEADER.size + length:
            raise CannotDecode("stream")
        unpacker = zlib.decompressobj()
        try:
            plain = unpacker.decompress(source[_HEADER.size :], nbytes)
        except zlib.error as error:
            raise CannotDecode("stream") from error
        if len(plain) != nbytes:
            raise CannotDecode("stream")
        target[:] = plain

    def header(self, shape: PayloadShape, packed: bytes) -> bytes:
        return _HEADER.pack(b"TEST", shape.nbytes, _TYPES[shape.dtype], len(packed))

    def kept(self, source: memoryview, shape: PayloadShape, level: str) -> bytes:
        return bytes(source)

    def error(self, source: memoryview, shape: PayloadShape, level: str) -> float:
        return 0.0


class RightLossy(Right):
    """Clears the low bits of mantissas; needs axes, to measure its error."""

    info = CodecInfo(
        name="lossy",
        version=1,
        lossless=False,
        needs_axes=True,
        levels=("low", "high"),
        default_level="low",
        max_error={"low": 0.05, "high": 0.2},
    )

    def encode_into(
        self, source: memoryview, target: memoryview, *, shape: PayloadShape, level: str = ""
    ) -> Encoded:
        if not shape.tensors:
            raise CannotEncode("axes" if shape.nbytes else "size")
        level = level or "low"
        encoded = super().encode_into(source, target, shape=shape, level=level)
        if not encoded.error <= self.info.max_error[level]:
            raise CannotEncode("bound")
        return encoded

    def kept(self, source: memoryview, shape: PayloadShape, level: str) -> bytes:
        low = {"bfloat16": 3, "float16": 6, "float32": 19}[shape.dtype] + 2 * (level == "high")
        kind: Any = np.uint32 if shape.element_bytes == 4 else np.uint16
        bits = np.frombuffer(source, kind)
        kept: bytes = (bits & ~kind((1 << low) - 1)).tobytes()
        return kept

    def error(self, source: memoryview, shape: PayloadShape, level: str) -> float:
        with np.errstate(all="ignore"):
            return error_of(bytes(source), self.kept(source, shape, level), shape)


def write_behind(target: memoryview) -> None:
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(target)) + len(target), 0, 8)


class NoBound(RightLossy):
    """A level without a bound."""

    kills = "X1"
    info = CodecInfo(
        name="lossy", version=1, lossless=False, needs_axes=True, levels=("low", "high"),
        default_level="low", max_error={"low": 0.05},
    )  # fmt: skip


class LongName(Right):
    """A name that no envelope holds."""

    kills = "X1"
    info = CodecInfo(name="r" * 33, version=1, lossless=True)


class ClaimsLossless(RightLossy):
    """Says that it is lossless, and is not."""

    kills = "X2"
    info = CodecInfo(name="lossy", version=1, lossless=True, needs_axes=True)


class HalfDecoded(Right):
    """Leaves the end of the target as it was."""

    kills = "X2"

    def decode_into(self, source: memoryview, target: memoryview, *, shape: PayloadShape) -> None:
        scratch = bytearray(len(target))
        super().decode_into(source, memoryview(scratch), shape=shape)
        end = len(target) - len(target) // 4
        target[:end] = scratch[:end]


class OneTypeOnly(Right):
    """Takes float32 alone."""

    kills = "X2"

    def encode_into(self, source: Any, target: Any, *, shape: Any, level: str = "") -> Encoded:
        if shape.dtype != "float32":
            raise CannotEncode("dtype")
        return super().encode_into(source, target, shape=shape, level=level)


class NotMeasured(RightLossy):
    """Says an error of nothing."""

    kills = "X3"

    def error(self, source: memoryview, shape: PayloadShape, level: str) -> float:
        return 0.0


class MeasuredOverAll(RightLossy):
    """Measures over the whole payload, where a small layer is lost beside a large one."""

    kills = "X3"

    def kept(self, source: memoryview, shape: PayloadShape, level: str) -> bytes:
        kept = bytearray(super().kept(source, shape, level))
        if shape.tensors and shape.tensors[0].shape[0] > 1:
            tensor = shape.tensors[0]
            kept[tensor.offset_bytes : tensor.offset_bytes + shape.element_bytes] = bytes(
                shape.element_bytes
            )
            stride = tensor.strides_bytes[0]
            for at in range(0, stride // 2, shape.element_bytes * 3):
                kept[at : at + shape.element_bytes] = bytes(shape.element_bytes)
        return bytes(kept)

    def error(self, source: memoryview, shape: PayloadShape, level: str) -> float:
        return min(0.04, super().error(source, shape, level))


class OwnReason(RightLossy):
    """Refuses for a reason that core does not know."""

    kills = "X4"

    def encode_into(self, source: Any, target: Any, *, shape: Any, level: str = "") -> Encoded:
        try:
            return super().encode_into(source, target, shape=shape, level=level)
        except CannotEncode:
            raise CannotEncode("because") from None


class TakesNothing(Right):
    """Makes a stream of an empty payload."""

    kills = "X4"

    def encode_into(self, source: Any, target: Any, *, shape: Any, level: str = "") -> Encoded:
        if not shape.nbytes:
            target[:4] = b"TEST"
            return Encoded(4)
        return super().encode_into(source, target, shape=shape, level=level)


class NansBecomeZeros(RightLossy):
    """Takes values that are not finite, and changes them."""

    kills = "X4"

    def encode_into(self, source: Any, target: Any, *, shape: Any, level: str = "") -> Encoded:
        try:
            return super().encode_into(source, target, shape=shape, level=level)
        except CannotEncode as refusal:
            if refusal.reason != "bound":
                raise
        packed = zlib.compress(bytes(len(source)))
        stream = self.header(shape, packed) + packed
        if len(stream) > len(target):
            raise CannotEncode("size")
        target[: len(stream)] = stream
        return Encoded(len(stream), 0.0)


class CutsItself(Right):
    """Writes as much as fits."""

    kills = "X5"

    def encode_into(self, source: Any, target: Any, *, shape: Any, level: str = "") -> Encoded:
        room = bytearray(2 * len(source) + 100)
        done = super().encode_into(source, memoryview(room), shape=shape, level=level)
        nbytes = min(done.nbytes, len(target))
        target[:nbytes] = room[:nbytes]
        return Encoded(max(1, nbytes))


class PadsWhatIsCut(Right):
    """Takes zeros for what is missing at the end."""

    kills = "X6"

    def decode_into(self, source: memoryview, target: memoryview, *, shape: PayloadShape) -> None:
        if len(source) < _HEADER.size:
            raise CannotDecode("stream")
        magic, _, _, length = _HEADER.unpack_from(source)
        whole = bytes(source) + bytes(max(0, _HEADER.size + length - len(source)))
        try:
            super().decode_into(memoryview(whole), target, shape=shape)
        except CannotDecode:
            if magic != b"TEST" or len(source) >= _HEADER.size + length:
                raise
            target[:] = bytes(len(target))


class IgnoresTheRest(Right):
    """Does not mind bytes behind the stream."""

    kills = "X6"

    def decode_into(self, source: memoryview, target: memoryview, *, shape: PayloadShape) -> None:
        if len(source) >= _HEADER.size:
            length = _HEADER.unpack_from(source)[3]
            source = source[: _HEADER.size + length]
        super().decode_into(source, target, shape=shape)


class AnyLength(Right):
    """Does not compare the stream's shape with the one that is asked for."""

    kills = "X7"

    def decode_into(self, source: memoryview, target: memoryview, *, shape: PayloadShape) -> None:
        if len(source) < _HEADER.size:
            raise CannotDecode("stream")
        magic, _, _, length = _HEADER.unpack_from(source)
        if magic != b"TEST" or len(source) != _HEADER.size + length:
            raise CannotDecode("stream")
        try:
            plain = zlib.decompress(source[_HEADER.size :])
        except zlib.error as error:
            raise CannotDecode("stream") from error
        count = min(len(plain), len(target))
        target[:count] = plain[:count]


class AnyType(Right):
    """Does not compare the type of the elements."""

    kills = "X7"

    def header(self, shape: PayloadShape, packed: bytes) -> bytes:
        return _HEADER.pack(b"TEST", shape.nbytes, 0, len(packed))

    def decode_into(self, source: memoryview, target: memoryview, *, shape: PayloadShape) -> None:
        plain = PayloadShape(nbytes=shape.nbytes)
        super().decode_into(source, target, shape=plain)


class Careless(Right):
    """Does something of its own on a stream that zlib does not understand."""

    def decode_into(self, source: memoryview, target: memoryview, *, shape: PayloadShape) -> None:
        try:
            super().decode_into(source, target, shape=shape)
        except CannotDecode as error:
            if error.__cause__ is not None:
                self.puzzled(error.__cause__, target)
            raise

    def puzzled(self, cause: BaseException, target: memoryview) -> None:
        raise NotImplementedError


class OtherErrors(Careless):
    """Lets zlib's own error out."""

    kills = "X8"

    def puzzled(self, cause: BaseException, target: memoryview) -> None:
        raise cause


class Dies(Careless):
    """Ends the process on a stream that it does not understand."""

    kills = "X8"

    def puzzled(self, cause: BaseException, target: memoryview) -> None:
        os.abort()


class WritesOutside(Careless):
    """Follows a damaged length past its target."""

    kills = "X8"

    def puzzled(self, cause: BaseException, target: memoryview) -> None:
        write_behind(target)


class TakesLong(Careless):
    """Searches long for sense in a damaged stream."""

    kills = "X8"

    def puzzled(self, cause: BaseException, target: memoryview) -> None:
        time.sleep(2.5)


class SharedScratch(Right):
    """One scratch buffer for all threads."""

    kills = "X9"

    def __init__(self) -> None:
        self._scratch = b""

    def kept(self, source: memoryview, shape: PayloadShape, level: str) -> bytes:
        self._scratch = bytes(source)
        time.sleep(0.002)
        return self._scratch


_FIRST_PID = os.getpid()


class OfThisProcess(Right):
    """Its streams differ from process to process."""

    kills = "X10"

    def header(self, shape: PayloadShape, packed: bytes) -> bytes:
        magic = b"TEST" if os.getpid() == _FIRST_PID else b"test"
        return _HEADER.pack(magic, shape.nbytes, _TYPES[shape.dtype], len(packed))


class DecodesElsewhereOtherwise(Right):
    """Decodes by a table that only the first process has."""

    kills = "X10"

    def decode_into(self, source: memoryview, target: memoryview, *, shape: PayloadShape) -> None:
        super().decode_into(source, target, shape=shape)
        if os.getpid() != _FIRST_PID and len(target):
            target[0] ^= 1


class KeepsTheSource(Right):
    """Keeps a view of what it decoded last."""

    kills = "X11"

    def decode_into(self, source: memoryview, target: memoryview, *, shape: PayloadShape) -> None:
        self._last = source[:]
        super().decode_into(source, target, shape=shape)


class KeepsTheTarget(Right):
    """Keeps a view of where it encoded last."""

    kills = "X11"

    def encode_into(self, source: Any, target: Any, *, shape: Any, level: str = "") -> Encoded:
        self._last = target[:]
        return super().encode_into(source, target, shape=shape, level=level)


class HoldsTheLock(Right):
    """Works on long payloads without letting others go on."""

    kills = "X12"

    def encode_into(self, source: Any, target: Any, *, shape: Any, level: str = "") -> Encoded:
        if shape.nbytes > 1 << 20:
            # Adding up an integer range is one call of C that keeps the interpreter's lock.
            sum(range(150_000_000))
        return super().encode_into(source, target, shape=shape, level=level)


class EncodesBeyond(Right):
    """Notices that its target is full after it has written behind it."""

    kills = "X5"

    def encode_into(self, source: Any, target: Any, *, shape: Any, level: str = "") -> Encoded:
        try:
            return super().encode_into(source, target, shape=shape, level=level)
        except CannotEncode:
            if len(target):
                write_behind(target)
            raise


WRONG = [
    each
    for each in list(globals().values())
    if isinstance(each, type) and issubclass(each, Codec) and "kills" in vars(each)
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda each: each.__name__)
def test_a_wrong_codec_is_found_by_the_check_that_is_meant(wrong: Any) -> None:
    only = [check for check in CODEC_CHECKS if check.id == wrong.kills]
    found = judge_codec(wrong(), seed=1, checks=only)
    assert found.verdict == "FAIL", wrong.__doc__


@pytest.mark.parametrize("right", [Right, RightLossy])
def test_a_right_codec_passes(right: type[Codec]) -> None:
    found = judge_codec(right(), seed=1)
    failed = {each["id"]: each["reason"] for each in found.checks if each["outcome"] == "FAIL"}
    assert failed == {}
    assert found.verdict == "PASS"


def test_there_are_enough_wrong_ones_for_every_check() -> None:
    assert {wrong.kills for wrong in WRONG} == {check.id for check in CODEC_CHECKS}
    assert len(WRONG) >= 20


class TestRight(CodecConformance):
    codec = Right()


def test_a_check_can_not_be_overridden() -> None:
    with pytest.raises(TypeError, match="test_x2_round_trip"):
        type("Cheating", (CodecConformance,), {"codec": Right(), "test_x2_round_trip": None})


def test_the_command_writes_a_certificate(tmp_path: Any) -> None:
    done = CliRunner().invoke(app, ["codec", "zstd", "--report", str(tmp_path), "--seed", "1"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "codec-zstd.json").exists()


def test_an_unknown_codec_is_one_line(tmp_path: Any) -> None:
    done = CliRunner().invoke(app, ["codec", "zstdd", "--report", str(tmp_path)])
    assert done.exit_code == 2
    assert "did you mean 'zstd'?" in done.output
