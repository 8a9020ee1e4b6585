"""X: codecs.  Each check is a function of a `CodecRig`."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import threading
import time
from collections.abc import Callable

import numpy as np

from lmcache_conformance.codecs.payloads import Sample, error_of, kv_like, paged
from lmcache_conformance.codecs.rig import CodecRig
from lmcache_conformance.frame import Check, NotClaimed, Wrong, check
from lmcache_core.sdk import CODEC_API_VERSION, CannotDecode, CannotEncode, PayloadShape

FUZZED = 10_000
DECODE_LIMIT_S = 2.0
"""For one damaged stream of a few kilobytes."""
_REASONS = {"axes", "dtype", "nonfinite", "bound", "size"}


@check("X1", fix="see CodecInfo: name, levels, default level, a bound for every level if lossy")
def info_is_complete(rig: CodecRig) -> None:
    """What the codec says of itself is complete and consistent."""
    info = rig.codec.info
    if not info.name.isascii() or not 0 < len(info.name) <= 32:
        raise Wrong(f"its name {info.name!r} does not fit an envelope")
    if not info.levels or info.default_level not in info.levels:
        raise Wrong(f"default level {info.default_level!r} is none of {info.levels}")
    if not info.lossless:
        bounds = [info.max_error.get(level, math.nan) for level in info.levels]
        if not all(0 < bound < 1 for bound in bounds):
            raise Wrong(f"levels {info.levels} have the bounds {bounds}")
    if info.api_min[0] != CODEC_API_VERSION[0] or tuple(info.api_min) > CODEC_API_VERSION:
        raise Wrong(f"it needs contract {info.api_min}, this is {CODEC_API_VERSION}")


@check("X2", fix="decode_into must fill all of its target with what encode_into promised")
def round_trip(rig: CodecRig) -> None:
    """Every payload that is taken comes back: bit for bit, or within the declared bound; sensible
    payloads of every element type are taken."""
    taken = set()
    for level in rig.levels:
        for sample, stream, _ in rig.taken(level):
            decoded = rig.decode(stream, sample.shape, sample.name)
            if isinstance(decoded, CannotDecode):
                raise Wrong(f"{sample.name}: its own stream is refused: {decoded}")
            taken.add(sample.shape.dtype)
            if rig.codec.info.lossless and decoded != sample.payload:
                raise Wrong(f"{sample.name}: it came back changed")
    missing = {"bfloat16", "float16", "float32"} - taken
    if missing:
        raise Wrong(f"no payload of {', '.join(sorted(missing))} is taken")


@check("X3", fix="measure the error on what decode_into gives, over each layer of each tensor")
def the_bound_is_kept(rig: CodecRig) -> None:
    """The error of every payload is what was said, and within the level's bound."""
    info = rig.codec.info
    if info.lossless:
        raise NotClaimed("the codec is lossless")
    for level in rig.levels:
        for sample, stream, (_, said) in rig.taken(level):
            decoded = rig.decode(stream, sample.shape, sample.name)
            assert isinstance(decoded, bytes)
            found = error_of(sample.payload, decoded, sample.shape)
            if not found <= info.max_error[level] * 1.001:
                raise Wrong(f"{sample.name} at {level!r}: error {found:.4g}, bound "
                            f"{info.max_error[level]:.4g}")  # fmt: skip
            if not found <= said * 1.01 + 1e-6:
                raise Wrong(f"{sample.name} at {level!r}: error {found:.4g}, said {said:.4g}")


@check("X4", fix="raise CannotEncode with one of its reasons; core then stores the chunk otherwise")
def refusals_have_a_reason(rig: CodecRig) -> None:
    """What the codec does not take is refused with a known reason: unknown axes, values that are
    not finite, a target that is too short, nothing at all."""
    info = rig.codec.info
    for sample in rig.samples():
        encoded = rig.encode(sample)
        if isinstance(encoded, CannotEncode):
            if encoded.reason not in _REASONS:
                raise Wrong(f"{sample.name}: unknown reason {encoded.reason!r}")
            if info.lossless and encoded.reason != "size":
                raise Wrong(f"{sample.name}: a lossless codec refused for {encoded.reason!r}")
            continue
        if info.needs_axes and not sample.shape.tensors:
            raise Wrong(f"{sample.name}: taken without axes, though it says that it needs them")
        if not sample.finite and not info.lossless:
            decoded = rig.decode(encoded[0], sample.shape, sample.name)
            if decoded != sample.payload:
                raise Wrong(f"{sample.name}: values that are not finite came back changed")
    nothing = Sample("nothing", PayloadShape(nbytes=0), b"")
    if not isinstance(rig.encode(nothing), CannotEncode):
        raise Wrong("a payload of no bytes was taken")


@check("X5", fix="look at the target's length before every write")
def a_short_target(rig: CodecRig) -> None:
    """A target of any length below the stream's is refused as ``size``; nothing is written outside
    of it."""
    sample, stream = rig.streams()[0]
    for room in {0, 1, 2, 3, 7, 16, len(stream) // 2, len(stream) - 1}:
        encoded = rig.encode(sample, room=room)
        if not isinstance(encoded, CannotEncode) or encoded.reason != "size":
            raise Wrong(f"{len(stream)} bytes went into a target of {room}")


@check("X6", fix="write every length into the stream, and look that all of it is there")
def cut_streams_are_refused(rig: CodecRig) -> None:
    """A stream that is cut anywhere, or longer than it was, is refused."""
    for level in rig.levels:
        sample, stream = min(rig.streams(level), key=lambda each: len(each[1]))
        longest = max(rig.streams(level), key=lambda each: len(each[1]))
        for each, whole in ((sample, stream), longest):
            step = max(1, len(whole) // 400)
            for end in {*range(0, len(whole), step), len(whole) - 1}:
                if not isinstance(rig.decode(whole[:end], each.shape), CannotDecode):
                    raise Wrong(f"{end} bytes of {len(whole)} were decoded")
            if not isinstance(rig.decode(whole + b"\0", each.shape), CannotDecode):
                raise Wrong("a stream with a byte too many was decoded")


@check("X7", fix="check the stream's shape against the one that is asked for")
def another_shape_is_refused(rig: CodecRig) -> None:
    """A stream is refused for a payload of another length or element type."""
    sample, stream = rig.streams()[0]
    size = sample.shape.element_bytes
    others = [PayloadShape(nbytes=n) for n in (0, size, sample.shape.nbytes * 2)]
    longer = paged(
        sample.shape.dtype, layers=4, blocks=2, tokens=32, heads=2, head_size=32, transposed=True
    )
    other_type = "float32" if sample.shape.dtype != "float32" else "bfloat16"
    others += [longer, PayloadShape(nbytes=sample.shape.nbytes, dtype=other_type)]
    for other in others:
        if not isinstance(rig.decode(stream, other), CannotDecode):
            raise Wrong(f"a stream of {sample.shape.nbytes} bytes was decoded as {other.nbytes} "
                        f"of {other.dtype or 'bytes'}")  # fmt: skip


@check("X8", fix="bound every length, offset, table and loop that comes from the stream",
       limit_s=300.0)  # fmt: skip
def damaged_streams_do_no_harm(rig: CodecRig) -> None:
    """10,000 damaged streams: each is refused or decodes to something, in a time like a valid
    one's, without a crash, without touching other memory."""
    streams = [(s, e) for level in rig.levels for s, e in rig.streams(level) if len(e) < 60_000]
    told = _in_a_child(lambda: _fuzz(rig, streams))
    if told:
        raise Wrong(told)


@check("X9", fix="keep scratch memory by thread, and no state between calls")
def threads_do_not_disturb_each_other(rig: CodecRig) -> None:
    """Eight threads that encode and decode at once get what one thread gets."""
    level = rig.levels[-1]
    due = rig.streams(level)
    wrong: list[str] = []

    def work(number: int) -> None:
        for turn in range(len(due)):
            sample, stream = due[(turn + number) % len(due)]
            try:
                encoded = rig.encode(sample, level)
                if isinstance(encoded, CannotEncode) or encoded[0] != stream:
                    wrong.append(f"{sample.name}: another stream than alone")
                decoded, alone = rig.decode(stream, sample.shape), decodings[sample.name]
                if decoded != alone:
                    wrong.append(f"{sample.name}: decoded to something else than alone")
            except Wrong as error:
                wrong.append(str(error))

    decodings = {sample.name: rig.decode(stream, sample.shape) for sample, stream in due}
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if wrong:
        raise Wrong(wrong[0])


@check("X10", fix="the same bytes in, the same stream out: nothing of a process may be in it")
def streams_outlive_the_process(rig: CodecRig) -> None:
    """A stream is the same in another process, and decodes there to the same bytes."""
    due = rig.streams()
    decodings = [rig.decode(stream, sample.shape) for sample, stream in due]
    fresh = type(rig.codec)

    def again() -> str:
        os.environ["PYTHONHASHSEED"] = "1"
        other = CodecRig(fresh() if _is_plain(fresh) else rig.codec, seed=rig.seed)
        for (sample, stream), decoded in zip(due, decodings):
            encoded = other.encode(sample)
            if isinstance(encoded, CannotEncode) or encoded[0] != stream:
                return f"{sample.name}: another stream in another process"
            if other.decode(stream, sample.shape) != decoded:
                return f"{sample.name}: decoded to something else in another process"
        return ""

    told = _in_a_child(again)
    if told:
        raise Wrong(told)


@check("X11", fix="drop every memoryview and array over a buffer before you return")
def no_buffer_is_kept(rig: CodecRig) -> None:
    """After a call nothing holds its buffers, also when it was refused."""

    for sample, stream in rig.streams()[:3]:
        for damaged in (stream, stream[:-1]):
            target, source = bytearray(sample.shape.nbytes), bytearray(damaged)
            try:
                rig.codec.decode_into(
                    memoryview(source).toreadonly(), memoryview(target), shape=sample.shape
                )
            except CannotDecode:
                pass
            _must_be_free(source, target)
        source, target = bytearray(sample.payload), bytearray(2 * len(sample.payload) + 8192)
        rig.codec.encode_into(
            memoryview(source).toreadonly(), memoryview(target), shape=sample.shape
        )
        _must_be_free(source, target)


@check("X12", fix="release the interpreter's lock in long work: numba nogil, a library that does")
def other_threads_go_on(rig: CodecRig) -> None:
    """While 8 MiB are encoded and decoded another thread gets its turns."""
    shape = paged(
        "bfloat16", layers=8, blocks=2, tokens=128, heads=8, head_size=128, transposed=True
    )
    sample = Sample("8 MiB", shape, kv_like(shape, np.random.default_rng(rig.seed)))
    gaps: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        last_s = time.monotonic()
        while not stop.wait(0.0005):
            now_s = time.monotonic()
            gaps.append(now_s - last_s)
            last_s = now_s

    thread = threading.Thread(target=tick)
    thread.start()
    start_s = time.monotonic()
    encoded = rig.encode(sample)
    if not isinstance(encoded, CannotEncode):
        rig.decode(encoded[0], shape)
    seconds = time.monotonic() - start_s
    stop.set()
    thread.join()
    rig.figures = {"seconds": seconds, "longest_gap_s": max(gaps, default=seconds)}
    if seconds > 0.1 and max(gaps, default=seconds) > 0.5 * seconds:
        raise Wrong(f"another thread stood still for {max(gaps, default=seconds):.3f} s of "
                    f"{seconds:.3f} s")  # fmt: skip


def _must_be_free(*buffers: bytearray) -> None:
    for buffer in buffers:
        try:
            buffer.extend(b"x")
        except BufferError:
            raise Wrong("it holds a buffer of a call that has returned") from None


def _is_plain(kind: type) -> bool:
    """Whether another one can be made, as core does."""
    try:
        kind()
    except TypeError:
        return False
    return True


def _fuzz(rig: CodecRig, streams: list[tuple[Sample, bytes]]) -> str:
    rng = np.random.default_rng(rig.seed)
    for number in range(FUZZED):
        sample, stream = streams[int(rng.integers(len(streams)))]
        damaged = _damage(stream, rng, streams)
        start_s = time.monotonic()
        try:
            rig.decode(damaged, sample.shape, f"damaged stream {number}")
        except Wrong as error:
            return str(error)
        seconds = time.monotonic() - start_s
        if seconds > DECODE_LIMIT_S:
            return f"damaged stream {number} took {seconds:.1f} s"
    return ""


def _damage(stream: bytes, rng: np.random.Generator, streams: list[tuple[Sample, bytes]]) -> bytes:
    data = bytearray(stream)
    kind = int(rng.integers(6))
    if kind == 0:
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        # In the first bytes are lengths and counts.
        at = int(rng.integers(min(64, len(data))))
        data[at : at + 4] = rng.integers(0, 256, 4, np.uint8).tobytes()
    elif kind == 2:
        at, width = int(rng.integers(len(data))), int(rng.integers(1, 64))
        data[at : at + width] = b"\xff" * width
    elif kind == 3:
        other = streams[int(rng.integers(len(streams)))][1]
        at = int(rng.integers(len(data)))
        data[at:] = other[at:]
    elif kind == 4:
        head = int(rng.integers(0, 40))
        data[head:] = rng.integers(0, 256, max(0, len(data) - head), np.uint8).tobytes()
    else:
        for _ in range(int(rng.integers(2, 30))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
    return bytes(data)


def _in_a_child(work: Callable[[], str]) -> str:
    """What ``work`` says in a forked process, or how that died."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()  # how it died is told below
        try:
            text = work()
        except BaseException as error:
            text = f"it raised {error!r}"
        os.write(write_end, text.encode()[:60_000])
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        told = pipe.read().decode(errors="replace")
    _, code = os.waitpid(pid, 0)
    if os.WIFSIGNALED(code):
        return f"the process died of {signal.Signals(os.WTERMSIG(code)).name}"
    return told


CODEC_CHECKS: tuple[Check, ...] = tuple(
    each for each in list(globals().values()) if isinstance(each, Check)
)
"""In the order in which they run."""
