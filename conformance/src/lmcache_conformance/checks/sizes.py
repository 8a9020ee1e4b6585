"""D: values from one byte to the largest, and alignment."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lmcache_conformance.frame import Inconclusive, NotClaimed, check
from lmcache_conformance.memory import Memory, value
from lmcache_conformance.rig import Rig, within
from lmcache_core.sdk import Buffer, GetResult, MemoryKind, Status

_QUICK = (1, 2, 511, 4095, 4096, 4097, 65535, 65536, 65537, (1 << 20) - 1, (1 << 20) + 1, 5 << 20)
_FULL = ((2 << 20) - 1, 2 << 20, (2 << 20) + 1, (8 << 20) + 3, 33 << 20, (64 << 20) + 1)
_TRIED_MAX = 256 << 20


@check("D1", fix="loop until all bytes are moved: short reads and writes are normal")
def every_size(rig: Rig) -> None:
    """Values of every size that alignment allows come back whole."""
    key, step = rig.key("k"), rig.claims.alignment
    wanted = {max(step, n // step * step) for n in (*_QUICK, *(_FULL if rig.full else ()))}
    for size in sorted(n for n in wanted if n <= rig.claims.max_value_bytes):
        content = value(size, size)
        rig.must_put({key: content})
        rig.expect_value(key, content, f"a value of {size} bytes")
        rig.expect(rig.store.delete([key], within(10)) == [Status.OK], "delete was not OK")


@check("D2", fix="answer REJECTED when nbytes is over max_value_bytes, before anything is sent")
def over_max_value_bytes(rig: Rig) -> None:
    """A value over max_value_bytes is REJECTED, nothing is stored, its neighbours are."""
    most, step = rig.claims.max_value_bytes, rig.claims.alignment
    if most > 1 << 30:
        raise NotClaimed("max_value_bytes is over 1 GiB, more than a chunk of core")
    key, neighbour = rig.key("large"), rig.key("small")
    content = value(rig.seed, rig.size())
    memory = Memory([most + step, len(content)])
    memory.fill(1, content)
    asked = [key, neighbour] if rig.claims.max_batch > 1 else [key]
    sources = memory.buffers(read_only=True)[: len(asked)]
    answers = rig.store.put_from(asked, sources, within(30))
    rig.expect(
        answers[0] is Status.REJECTED, f"{most + step} bytes were answered {answers[0].name}"
    )
    rig.expect(answers[1:] in ([], [Status.OK]), "the key beside a value too large was not OK")
    rig.expect_absent(key, "a value over max_value_bytes")


@check("D3", fix="lower max_value_bytes to what the store takes")
def max_value_bytes_works(rig: Rig) -> None:
    """A value of exactly max_value_bytes comes back whole."""
    most = rig.claims.max_value_bytes
    if most > _TRIED_MAX:
        raise NotClaimed(f"max_value_bytes is over {_TRIED_MAX >> 20} MiB, see D5")
    key, content = rig.key("k"), value(rig.seed, most)
    rig.must_put({key: content})
    rig.expect_value(key, content, "a value of max_value_bytes")


@check("D4", fix="use BatchLoop.usable_view, or claim alignment=1 and take any address")
def alignment_as_claimed(rig: Rig) -> None:
    """With alignment 1 any address and size works; else a misaligned one is REJECTED, nothing is
    touched and its neighbours are served."""
    step, size = rig.claims.alignment, rig.size()
    key, good = rig.key("odd"), rig.key("good")
    if step == 1:
        content = value(rig.seed, 4097)
        source = Memory.of([content], offset=3)
        answers = rig.store.put_from([key], source.buffers(read_only=True), within(10))
        rig.expect(answers == [Status.OK], f"an odd source was answered {answers}")
        target = Memory([4097], offset=5)
        results = rig.store.get_into([key], target.buffers(), within(10))
        rig.expect(results == [GetResult(Status.OK, 4097)], f"an odd target gave {results}")
        rig.expect(target.bytes_of(0) == content, "an odd target got other bytes")
        return
    rig.must_put({good: value(rig.seed, size)})
    for offset, nbytes in ((step // 2, size), (0, size + step // 2)):
        source = Memory([nbytes], offset=offset)
        answers = rig.store.put_from([key], source.buffers(read_only=True), within(10))
        rig.expect(answers == [Status.REJECTED], f"a misaligned source was answered {answers}")
        target = Memory([nbytes], offset=offset)
        results = rig.store.get_into([good], target.buffers(), within(10))
        rig.expect(
            results[0].status is Status.REJECTED, f"a misaligned target was answered {results}"
        )
        rig.expect(target.untouched(), "a misaligned target was written to")
    rig.expect_absent(key, "after misaligned puts")


@check("D5", full_only=True, limit_s=600, fix="use 64-bit sizes; split calls that take a C int")
def around_two_gibibytes(rig: Rig) -> None:
    """Where max_value_bytes allows it, values of 2^31-1, 2^31 and 2^31+1 bytes come back whole."""
    step = rig.claims.alignment
    sizes = sorted({n // step * step for n in ((1 << 31) - 1, 1 << 31, (1 << 31) + step)})
    if sizes[-1] > rig.claims.max_value_bytes:
        raise NotClaimed("max_value_bytes is below 2^31")
    if _available_bytes() < 4 * sizes[-1]:
        raise Inconclusive("it takes 8 GiB of free memory")
    key = rig.key("huge")
    pattern = np.random.default_rng(rig.seed).integers(0, 256, (1 << 20) + 7, np.uint8)
    for size in sizes:
        memory = Memory([size])
        start = Memory.GAP
        memory.array[start : start + size] = np.resize(pattern, size)
        answers = rig.store.put_from([key], memory.buffers(read_only=True), within(300))
        if answers == [Status.REJECTED]:
            raise Inconclusive("the store has no room for 2 GiB")
        rig.expect(answers == [Status.OK], f"{size} bytes were answered {answers}")
        memory.array[start : start + size] = 0
        results = rig.store.get_into([key], memory.buffers(), within(300))
        rig.expect(results == [GetResult(Status.OK, size)], f"{size} bytes gave {results}")
        same = np.array_equal(memory.array[start : start + size], np.resize(pattern, size))
        rig.expect(same, f"{size} bytes came back changed")
        rig.store.delete([key], within(60))


@check("D6", fix="check the memory kind of each buffer before its address is used")
def memory_kinds(rig: Rig) -> None:
    """A buffer in memory of a kind that is not claimed is REJECTED; kinds that are claimed work."""
    if MemoryKind.HOST not in rig.claims.memory:
        raise Inconclusive("host memory is not claimed, and this machine has no other")
    if MemoryKind.DEVICE in rig.claims.memory:
        raise Inconclusive("device memory is claimed, and this machine has no device")
    key, size = rig.key("k"), rig.size()
    rig.must_put({key: value(rig.seed, size)})
    foreign = Buffer(None, 1 << 40, size, MemoryKind.DEVICE)
    results = rig.store.get_into([key], [foreign], within(5))
    rig.expect(results[0].status is Status.REJECTED, f"a device target was answered {results}")
    answers = rig.store.put_from([rig.key("new")], [foreign], within(5))
    rig.expect(answers == [Status.REJECTED], f"a device source was answered {answers}")
    rig.expect_absent(rig.key("new"), "after a put out of device memory")


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
