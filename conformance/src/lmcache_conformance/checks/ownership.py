"""G: memory is core's; a connector borrows it for one call."""

from __future__ import annotations

import ctypes
import time

from lmcache_conformance.checks.stalling import stalled
from lmcache_conformance.child import Child, Died, digest
from lmcache_conformance.frame import Wrong, check
from lmcache_conformance.memory import Memory, value
from lmcache_conformance.rig import Rig, within
from lmcache_conformance.shim import Action
from lmcache_core.sdk import Buffer, RemoteConnector, Status


def _owned(nbytes: int, alignment: int) -> tuple[bytearray, Buffer]:
    """A bytearray and a buffer inside it that keeps ``alignment``."""
    owned = bytearray(nbytes + alignment)
    base = ctypes.addressof(ctypes.c_char.from_buffer(owned))
    start = -base % alignment
    view = memoryview(owned)[start : start + nbytes]
    return owned, Buffer(view, base + start, nbytes)


@check("G1", fix="release every memoryview (and numpy array over one) before the call returns")
def no_view_is_kept(rig: Rig) -> None:
    """When a call returns its buffers are core's again: no view of them is kept, whether the
    answer was OK, MISS or SIZE_MISMATCH."""
    size, step = rig.size(), rig.claims.alignment
    key = rig.key("k")
    content = value(rig.seed, size)
    for op, name, nbytes in (
        ("put_from", key, size), ("get_into", key, size), ("get_into", rig.key("none"), size),
        ("get_into", key, size - step if step < size else step),
    ):  # fmt: skip
        owned, buffer = _owned(nbytes, step)
        assert buffer.view is not None
        if op == "put_from":
            buffer.view[:] = content
        getattr(rig.store, op)([name], [buffer], within(10))
        buffer.view.release()
        try:
            owned.extend(b"!")
        except BufferError:
            raise Wrong(f"after {op} returned, a view of its buffer is still held") from None
    rig.expect_value(key, content, "after views were taken back")


@check("G2", fix="wait for the native library before the call returns, or answer ABANDONED")
def no_late_touch(rig: Rig) -> None:
    """After a call returns nothing touches its buffers: their pages are taken away in a child
    process, which must live on."""
    size = rig.size(1 << 20)
    with Child(rig.url, rig.harness.module, rig.scratch) as child:
        try:
            for turn in range(3):
                key = rig.key(f"k{turn}").hex()
                put = child.call("put", key=key, seed=turn, nbytes=size, guard=True)
                rig.expect(put.get("status") == "OK", f"put_from in a child answered {put}")
                got = child.call("get", key=key, nbytes=size, guard=True)
                rig.expect(got.get("status") in ("OK", "MISS"), f"get_into answered {got}")
                child.call("get", key=rig.key("none").hex(), nbytes=size, guard=True)
            time.sleep(0.3)
            child.call("exists", key=rig.key("k0").hex())
        except Died as death:
            raise Wrong(
                f"the process died with {death.code} on memory that was core's again: "
                "a source was written to, or a buffer was touched after its call returned"
            ) from None


@check("G3", fix="clip every write to min(value, target); never round up to a block")
def only_the_target(rig: Rig) -> None:
    """Whatever the answer, bytes outside of the targets are never touched."""
    step = rig.claims.alignment
    key = rig.key("k")
    for size in (step, 3 * step, rig.size(4096) + step, rig.size(100_000)):
        rig.must_put({key: value(size, size)})
        for nbytes in {step, size - step, size, size + step, size + 4096}:
            if nbytes > 0:
                rig.get(key, nbytes)
        memory = Memory([size] * min(5, rig.claims.max_batch))
        keys = [key, *rig.keys(4)][: rig.claims.max_batch]
        rig.store.get_into(keys, memory.buffers()[: len(keys)], within(10))
        rig.expect(memory.canaries_intact(), "get_into wrote outside of its targets")


@check("G4", fix="copy before you encrypt, compress or swap bytes in place")
def source_is_read_only(rig: Rig) -> None:
    """A source is never written to, and its view is read-only: also when the put replaces."""
    size = rig.size(64 << 10)
    key = rig.key("k")
    for turn in range(3):
        rig.must_put({key: value(turn, size)})
    memory = Memory.of([value(9, size)])
    before = memory.array.tobytes()
    rig.store.put_from([key], memory.buffers(read_only=True), within(10))
    time.sleep(0.05)
    rig.expect(memory.array.tobytes() == before, "put_from changed its source")


@check(
    "G5",
    limit_s=90,
    fix="bounce through memory of your own, or answer ABANDONED and call "
    "HostServices.released(token) when the library is done",
)
def no_write_after_timed_out(rig: Rig) -> None:
    """A get that a standing store makes late: after TIMED_OUT nothing writes to its target for 2 s
    once the store goes on; after ABANDONED nothing after released(token)."""
    size, key = rig.size(1 << 20), rig.key("k")
    rig.must_put({key: value(rig.seed, size)})
    with Child(rig.url, rig.harness.module, rig.scratch, preload=True) as child:
        warm = child.call("get", key=key.hex(), nbytes=size, arm={"action": int(Action.COUNT)})
        with stalled(rig, child, for_s=1.2) as arm:
            if arm is not None:
                # The last call of a get is what moves the bytes.
                arm["at"] = sum(warm["seen"].values())
            found = child.call("get", key=key.hex(), nbytes=size, seconds=0.4, watch_s=3.2, arm=arm)
        if "error" in found:
            return
        status = found["status"]
        if status == "OK":
            # Too late, which H4 judges; but the value was there when the call returned.
            rig.expect(found["digest"] == digest(value(rig.seed, size)), "a late OK of other bytes")
            return
        rig.expect(
            found["released"],
            "a buffer answered ABANDONED was never given back: call HostServices.released(token)",
        )
        rig.expect(not found["late"], f"the target was written to after {status}")
        again = child.call("get", key=key.hex(), nbytes=size)
        rig.expect(
            again.get("digest") in (digest(value(rig.seed, size)), None),
            "the value is another one after a stall",
        )


@check("G6", fix="BatchLoop and GuardedLoop hold no buffer; keep tokens, not views")
def many_buffers_in_turn(rig: Rig) -> None:
    """The same memory lent again and again for other keys always holds the last key's bytes."""
    size, count = rig.size(), 8
    keys = rig.keys(count)
    memory = Memory([size])

    def lend(store: RemoteConnector, key: bytes, content: bytes) -> None:
        memory.fill(0, content)
        answers = store.put_from([key], memory.buffers(read_only=True), within(10))
        rig.expect(answers == [Status.OK], f"put_from answered {answers}")

    for number, key in enumerate(keys):
        lend(rig.store, key, value(number, size))
    memory.fill(0, b"\0" * size)
    for number, key in enumerate(keys):
        rig.store.get_into([key], memory.buffers(), within(10))
        rig.expect(
            memory.bytes_of(0) == value(number, size),
            "a value changed when its source's memory was used again",
        )
