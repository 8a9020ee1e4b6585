"""Z: what a backend that moves bytes without the host's help claims."""

from __future__ import annotations

import time

from lmcache_conformance.child import Child
from lmcache_conformance.frame import NotClaimed, Profile, check
from lmcache_conformance.memory import Memory, value
from lmcache_conformance.rig import Rig, within
from lmcache_core.sdk import (
    GetResult,
    Status,
    SupportsRegions,
    SupportsSubmit,
)

_VALUE = 64 << 20


@check(
    "Z1",
    profile=Profile.DIRECT,
    fix="move straight between the buffer and the store, or drop the claim",
)
def zero_copy(rig: Rig) -> None:
    """Where zero_copy is claimed, moving a value takes less than 10 % of its size in further host
    memory."""
    if not rig.claims.zero_copy:
        raise NotClaimed("zero_copy is not claimed")
    size = rig.size(min(_VALUE, rig.claims.max_value_bytes // 4096 * 4096))
    key = rig.key("k").hex()
    with Child(rig.harness.direct_url(), rig.harness.module, rig.scratch) as child:
        child.call("put", key=key, seed=1, nbytes=size)
        child.call("get", key=key, nbytes=size)
        for put in (True, False):
            found = child.call("peak", key=key, nbytes=size, put=put)
            rig.expect("error" not in found, f"a large value raised {found}")
            share = found["extra_bytes"] / size
            op = "put_from" if put else "get_into"
            rig.figures[f"{op}_extra_share"] = round(share, 4)
            rig.expect(
                share < 0.10, f"{op} of {size >> 20} MiB took {share:.0%} of that in addition"
            )


@check("Z2", profile=Profile.DIRECT, fix="register regions() at open, and follow on_region_added")
def regions(rig: Rig) -> None:
    """Where regions are claimed: buffers inside a registered region work, as do those outside and
    those of a region that was registered again."""
    if not rig.claims.regions:
        raise NotClaimed("regions is not claimed")
    assert isinstance(rig.store, SupportsRegions)
    size = rig.size(64 << 10)
    for turn in range(3):
        inside = Memory([size, size], region_id=1)
        assert inside.region is not None
        rig.store.register_region(inside.region)
        key, content = rig.key(f"k{turn}"), value(turn, size)
        inside.fill(0, content)
        source, target = inside.buffers()
        answers = rig.store.put_from([key], [source], within(10))
        rig.expect(answers == [Status.OK], f"put_from out of a region answered {answers}")
        results = rig.store.get_into([key], [target], within(10))
        rig.expect(results == [GetResult(Status.OK, size)], f"get_into a region gave {results}")
        rig.expect(inside.bytes_of(1) == content, "get_into a region gave other bytes")
        rig.expect(inside.canaries_intact(), "get_into wrote elsewhere in the region")
        rig.store.unregister_region(inside.region)
        rig.expect_value(key, content, "outside of every region")


@check(
    "Z3", profile=Profile.DIRECT, fix="poll gives None until every key is decided, then one list"
)
def submit_and_poll(rig: Rig) -> None:
    """Where submit is claimed: a started get is decided by its deadline, like get_into."""
    if not rig.claims.submit:
        raise NotClaimed("submit is not claimed")
    assert isinstance(rig.store, SupportsSubmit)
    size, key = rig.size(64 << 10), rig.key("k")
    rig.must_put({key: value(rig.seed, size)})
    memory = Memory([size, size])
    ticket = rig.store.submit_get([key, rig.key("none")], memory.buffers(), within(5))
    end_s = time.monotonic() + 6
    while (results := rig.store.poll(ticket)) is None:
        rig.expect(time.monotonic() < end_s, "poll decides nothing by the deadline")
        time.sleep(0.005)
    rig.expect(results == [GetResult(Status.OK, size), GetResult(Status.MISS)], f"poll: {results}")
    rig.expect(memory.bytes_of(0) == value(rig.seed, size), "submit_get gave other bytes")
    rig.expect(memory.canaries_intact(), "submit_get wrote outside of its targets")
