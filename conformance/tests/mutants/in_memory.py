"""Wrong answers: mutants of the memory connector."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from dataclasses import replace
from typing import ClassVar

from lmcache_core.connectors.memory import MemoryConnector
from lmcache_core.sdk import (
    BackendClosed,
    ContractViolation,
    GetResult,
    Health,
    OnExisting,
    ScanEntry,
    Sharing,
    Status,
    TargetTooSmall,
)
from mutants.catalogue import mutant

Base = MemoryConnector
ORIGINAL = Base.capabilities


@mutant("A1")
class ChangingClaims(Base):
    """Its capabilities change with the first put."""

    def put_one(self, key, source, timeout_s):
        super().put_one(key, source, timeout_s)
        self.capabilities = replace(self.capabilities, max_batch=7)


@mutant("A1")
class UnevenAlignment(Base):
    """It claims an alignment that core does not pad to."""

    capabilities = replace(ORIGINAL, alignment=3000)


@mutant("A6")
class ForkBlind(Base):
    """It works on in a forked child."""

    def check_call(self, keys, op, buffers=None):
        self._pid = os.getpid()
        super().check_call(keys, op, buffers)


@mutant("A7")
class SharedState(Base):
    """Closing one connector empties all."""

    _all: ClassVar[dict[bytes, bytes]] = {}

    def __init__(self, size_bytes=0):
        super().__init__(size_bytes)
        self._values = self._all


@mutant("A8")
class AlwaysIll(Base):
    """Its health says no of a store that works."""

    def health(self, ctx):
        self.check_call((), "health")
        return Health(ok=False, reason="?")


@mutant("B1")
class LastByteDropped(Base):
    """It stores all but the last byte."""

    def put_one(self, key, source, timeout_s):
        super().put_one(key, source[:-1], timeout_s)


@mutant("B1")
class ExistsSaysMiss(Base):
    """exists is always MISS."""

    def exists_one(self, key, timeout_s):
        return False


@mutant("B1")
class SizeOfTarget(Base):
    """nbytes is rounded up to a page."""

    def get_one(self, key, target, timeout_s):
        found = super().get_one(key, target, timeout_s)
        return found and found + 1


@mutant("B2")
class AbsentDeleteFails(Base):
    """delete of an absent key is MISS."""

    def delete(self, keys, ctx):
        there = [key in self._values for key in keys]
        said = super().delete(keys, ctx)
        return [s if t or s is not Status.OK else Status.MISS for s, t in zip(said, there)]


@mutant("B2")
class AbsentIsFailed(Base):
    """An absent key is FAILED."""

    def get_into(self, keys, targets, ctx):
        found = super().get_into(keys, targets, ctx)
        return [r if r.status is not Status.MISS else GetResult(Status.FAILED) for r in found]


@mutant("B3")
class StalePut(Base):
    """A put of a present key keeps the old value, though it claims replace."""

    def put_one(self, key, source, timeout_s):
        if key not in self._values:
            super().put_one(key, source, timeout_s)


@mutant("B3")
class TailOfTheOld(Base):
    """A shorter value leaves the tail of the longer one before it."""

    def put_one(self, key, source, timeout_s):
        old = self._values.get(key, b"")
        super().put_one(key, memoryview(bytes(source) + old[len(source) :]), timeout_s)


@mutant("B3")
class ClaimsKeep(Base):
    """It replaces, and claims to keep."""

    capabilities = replace(ORIGINAL, on_existing=OnExisting.KEEP)


@mutant("B4")
class DeleteForgets(Base):
    """delete says OK and does nothing."""

    def delete_one(self, key, timeout_s):
        pass


@mutant("B5")
class FillsTheTarget(Base):
    """A larger target is answered with its own size."""

    def get_one(self, key, target, timeout_s):
        found = super().get_one(key, target, timeout_s)
        return found and len(target)


@mutant("B6")
class CutsToFit(Base):
    """A smaller target gets the start of the value, and OK."""

    def get_one(self, key, target, timeout_s):
        value = self._values.get(key)
        if value is None:
            return None
        count = min(len(value), len(target))
        target[:count] = value[:count]
        return count


@mutant("B6")
class WrongTrueSize(Base):
    """SIZE_MISMATCH says the target's size as the value's."""

    def get_one(self, key, target, timeout_s):
        try:
            return super().get_one(key, target, timeout_s)
        except TargetTooSmall:
            raise TargetTooSmall(len(target)) from None


@mutant("B7")
class NotShared(Base):
    """It claims to be shared on the host, and is a dict of its own."""

    capabilities = replace(ORIGINAL, sharing=Sharing.HOST)


@mutant("B9")
class ScanOfTheDead(Base):
    """A scan lists deleted keys too."""

    def __init__(self, size_bytes=0):
        super().__init__(size_bytes)
        self._seen = {}

    def put_one(self, key, source, timeout_s):
        super().put_one(key, source, timeout_s)
        self._seen[key] = len(source)

    def scan(self, prefix, ctx):
        self.check_call((), "scan")
        for key, nbytes in list(self._seen.items()):
            if key.startswith(prefix):
                yield ScanEntry(key, nbytes)


@mutant("C1")
class Reversed(Base):
    """Results come in the opposite order."""

    def exists(self, keys, ctx):
        return super().exists(keys, ctx)[::-1]


@mutant("C1")
class SwappedTargets(Base):
    """The last two targets of a batch of more than two are swapped."""

    def get_into(self, keys, targets, ctx):
        keys = list(keys)
        if len(keys) > 2:
            targets = [*targets[:-3], targets[-1], targets[-2], targets[-3]]
        return super().get_into(keys, targets, ctx)


@mutant("C1")
class Generator(Base):
    """It answers with a generator."""

    def exists(self, keys, ctx):
        return (each for each in super().exists(keys, ctx))


@mutant("C2")
class EmptyIsAnError(Base):
    """An empty batch is a ContractViolation."""

    def exists(self, keys, ctx):
        if not keys:
            raise ContractViolation("no keys")
        return super().exists(keys, ctx)


@mutant("C3")
class HalfABatch(Base):
    """Only half of what max_batch claims is served."""

    def get_into(self, keys, targets, ctx):
        found = super().get_into(keys, targets, ctx)
        return [r if i < 64 else GetResult(Status.FAILED) for i, r in enumerate(found)]


@mutant("C4")
class TakesAnyBatch(Base):
    """It takes more than max_batch."""

    def exists(self, keys, ctx):
        half = self.capabilities.max_batch
        return super().exists(keys[:half], ctx) + super().exists(keys[half:], ctx)


@mutant("C5")
class OverlapAllowed(Base):
    """It does not look for overlapping targets."""

    def check_call(self, keys, op, buffers=None):
        super().check_call(keys, "put_from" if op == "get_into" else op, buffers)


@mutant("C6")
class OneBadPoisons(Base):
    """A key that is too large for its target spoils those after it."""

    def get_into(self, keys, targets, ctx):
        found = super().get_into(keys, targets, ctx)
        bad = [i for i, r in enumerate(found) if r.status is Status.SIZE_MISMATCH]
        return found if not bad else [*found[: bad[0] + 1], *[GetResult(Status.FAILED)] * (
            len(found) - bad[0] - 1)]  # fmt: skip


@mutant("C7")
class RaisesWhenLate(Base):
    """A deadline in the past raises."""

    def exists(self, keys, ctx):
        if keys and ctx.remaining_s() <= 0:
            raise TimeoutError("too late")
        return super().exists(keys, ctx)


@mutant("C7")
class IgnoresTheDeadline(Base):
    """It does what it is asked, however late."""

    def __init__(self, size_bytes=0):
        super().__init__(size_bytes)
        self._clock = lambda: 0.0


@mutant("D1")
class OneReadOnly(Base):
    """A value over 1 MiB is moved in one short read."""

    def get_one(self, key, target, timeout_s):
        found = super().get_one(key, target, timeout_s)
        if found and found > 1 << 20:
            target[1 << 20 : found] = bytes(found - (1 << 20))
        return found


@mutant("D2")
class NoLimit(Base):
    """It takes values over its max_value_bytes."""

    capabilities = replace(ORIGINAL, max_value_bytes=1 << 20)

    def put_from(self, keys, sources, ctx):
        claimed, self.capabilities = self.capabilities, ORIGINAL
        try:
            return super().put_from(keys, sources, ctx)
        finally:
            self.capabilities = claimed


@mutant("D3")
class SmallerThanClaimed(Base):
    """It takes half of max_value_bytes."""

    capabilities = replace(ORIGINAL, max_value_bytes=8 << 20)

    def put_from(self, keys, sources, ctx):
        if any(source.nbytes > 4 << 20 for source in sources):
            return [Status.REJECTED] * len(keys)
        return super().put_from(keys, sources, ctx)


@mutant("D4")
class AlignmentUnchecked(Base):
    """It claims an alignment of 512 and takes anything."""

    capabilities = replace(ORIGINAL, alignment=512)

    def usable_view(self, buffer):
        return buffer.view


@mutant("D6")
class AnyMemory(Base):
    """It takes a device buffer for host memory that is empty."""

    def usable_view(self, buffer):
        return super().usable_view(buffer) if buffer.view is not None else memoryview(bytearray())


@mutant("E1")
class KeysAsText(Base):
    """It folds the case of keys."""

    def _fold(self, key):
        return key.lower()

    def put_one(self, key, source, timeout_s):
        super().put_one(self._fold(key), source, timeout_s)

    def get_one(self, key, target, timeout_s):
        return super().get_one(self._fold(key), target, timeout_s)

    def exists_one(self, key, timeout_s):
        return super().exists_one(self._fold(key), timeout_s)

    def delete_one(self, key, timeout_s):
        super().delete_one(self._fold(key), timeout_s)


@mutant("E1")
class StripsKeys(KeysAsText):
    """It strips NULs and blanks off keys."""

    def _fold(self, key):
        return key.strip(b"\0 \n\r") or b"?"


@mutant("E2")
class LatinKeys(KeysAsText):
    """Bytes over 127 are replaced, as a decoder would."""

    def _fold(self, key):
        return key.decode("ascii", "replace").encode()


@mutant("E3")
class First32Bytes(KeysAsText):
    """Only the first 32 bytes of a key count."""

    def _fold(self, key):
        return key[:32]


@mutant("E4")
class ForgetsTheOldest(Base):
    """It keeps a thousand keys, and does not claim to evict."""

    def put_one(self, key, source, timeout_s):
        super().put_one(key, source, timeout_s)
        while len(self._values) > 1000:
            del self._values[next(iter(self._values))]


@mutant("F1")
class OneScratchBuffer(Base):
    """Calls at the same time share one buffer."""

    def __init__(self, size_bytes=0):
        super().__init__(size_bytes)
        self._scratch = b""

    def put_one(self, key, source, timeout_s):
        self._scratch = bytes(source)
        time.sleep(0.0005)
        super().put_one(key, memoryview(self._scratch), timeout_s)


@mutant("F2")
class DeletesFirst(Base):
    """A put deletes the old value, then stores the new one."""

    def put_one(self, key, source, timeout_s):
        self._values.pop(key, None)
        time.sleep(0.001)
        super().put_one(key, source, timeout_s)


@mutant("F2")
class InPlace(Base):
    """A put overwrites the stored bytes in place."""

    def put_one(self, key, source, timeout_s):
        old = self._values.get(key)
        if isinstance(old, bytearray) and len(old) == len(source):
            middle = len(old) // 2
            old[:middle] = source[:middle]
            time.sleep(0.001)
            old[middle:] = source[middle:]
        else:
            self._values[key] = bytearray(source)


@mutant("F3")
class CloseForgets(Base):
    """After close it works on."""

    def close(self):
        pass


@mutant("F4")
class ThreadPerOpen(Base):
    """Every open leaves a thread."""

    def __init__(self, size_bytes=0):
        super().__init__(size_bytes)
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


@mutant("F5")
class SecondCloseRaises(Base):
    """A second close raises."""

    def close(self):
        if self._closed:
            raise BackendClosed("closed already")
        super().close()


@mutant("G1")
class KeepsTheSource(Base):
    """It keeps a view of the source."""

    def put_one(self, key, source, timeout_s):
        super().put_one(key, source, timeout_s)
        self._last = source[:1]


@mutant("G1")
class KeepsTheMissedTarget(Base):
    """It keeps a view of a target that missed."""

    def get_one(self, key, target, timeout_s):
        found = super().get_one(key, target, timeout_s)
        if found is None:
            self._last = target[:1]
        return found


@mutant("G2")
class LateNativeTouch(Base):
    """A native thread writes to the target a moment after the call."""

    def get_into(self, keys, targets, ctx):
        found = super().get_into(keys, targets, ctx)
        at = targets[0].address if targets else 0
        if at:
            later = threading.Timer(0.05, lambda: ctypes.memset(at, 0, 1))
            later.daemon = True
            later.start()
        return found


@mutant("G3")
class WritesABlock(Base):
    """It writes a whole block of 512 bytes at the target's end."""

    def get_into(self, keys, targets, ctx):
        found = super().get_into(keys, targets, ctx)
        for result, target in zip(found, targets):
            if result.status is Status.OK:
                end = target.address + result.nbytes
                ctypes.memset(end, 0, -result.nbytes % 512)
        return found


@mutant("G4")
class SwapsInPlace(Base):
    """A put flips the source's bytes in place, and forgets to flip them back."""

    def put_from(self, keys, sources, ctx):
        said = super().put_from(keys, sources, ctx)
        for source in sources:
            byte = ctypes.c_ubyte.from_address(source.address)
            byte.value ^= 0xFF
        return said


@mutant("G6")
class StoresTheView(Base):
    """It stores the address and reads the bytes when asked for them."""

    def put_from(self, keys, sources, ctx):
        said = super().put_from(keys, sources, ctx)
        for key, source in zip(keys, sources):
            if key in self._values:
                kind = ctypes.c_char * source.nbytes
                self._values[key] = kind.from_address(source.address)
        return said

    def get_one(self, key, target, timeout_s):
        found = self._values.get(key)
        if found is None:
            return None
        raw = bytes(memoryview(found))
        if len(raw) > len(target):
            raise TargetTooSmall(len(raw))
        target[: len(raw)] = raw
        return len(raw)


@mutant("J1")
class DropsWhenFull(Base):
    """Full, it says OK and drops the value."""

    def put_one(self, key, source, timeout_s):
        try:
            super().put_one(key, source, timeout_s)
        except OSError:
            pass


@mutant("J1")
class FullIsFailed(Base):
    """Full, it answers FAILED."""

    def put_from(self, keys, sources, ctx):
        said = super().put_from(keys, sources, ctx)
        return [Status.FAILED if each is Status.REJECTED else each for each in said]


@mutant("J2")
class NeverFreed(Base):
    """used_bytes does not fall with a delete."""

    def delete_one(self, key, timeout_s):
        self._values.pop(key, None)


@mutant("J3")
class LeaseOnPaper(Base):
    """It claims leases and protects nothing."""

    capabilities = replace(ORIGINAL, leases=True)

    def lease(self, keys, ttl_s, ctx):
        return [Status.OK] * len(keys)

    def release(self, keys, ctx):
        return [Status.OK] * len(keys)


@mutant("K1")
class ForgetsEveryThird(Base):
    """A value that was replaced twice is gone."""

    def __init__(self, size_bytes=0):
        super().__init__(size_bytes)
        self._times = {}

    def put_one(self, key, source, timeout_s):
        super().put_one(key, source, timeout_s)
        self._times[key] = self._times.get(key, 0) + 1
        if self._times[key] == 3:
            self._values.pop(key)


@mutant("L1")
class GrowsPerCall(Base):
    """It keeps every value that it was ever given."""

    def put_one(self, key, source, timeout_s):
        super().put_one(key, source, timeout_s)
        vars(self).setdefault("_log", []).append(bytes(source))


@mutant("L2")
class DescriptorPerMiss(Base):
    """A call that misses leaves a file open."""

    def get_one(self, key, target, timeout_s):
        found = super().get_one(key, target, timeout_s)
        if found is None:
            os.open("/dev/null", os.O_RDONLY)
        return found


@mutant("Z1")
class CopiesAll(Base):
    """It claims zero copy and copies every value."""

    capabilities = replace(ORIGINAL, zero_copy=True)


@mutant("Z2")
class RegionsOnPaper(Base):
    """Buffers of a region are taken for offsets into it, and miss."""

    capabilities = replace(ORIGINAL, regions=True)

    def register_region(self, region):
        pass

    def unregister_region(self, region):
        pass

    def usable_view(self, buffer):
        return None if buffer.region is not None else super().usable_view(buffer)


@mutant("Z3")
class NeverDecides(Base):
    """poll never gives a result."""

    capabilities = replace(ORIGINAL, submit=True)

    def submit_get(self, keys, targets, ctx):
        return 1

    def poll(self, ticket):
        return None
