"""J: a store that is full."""

from __future__ import annotations

import time

from lmcache_conformance.frame import Inconclusive, NotClaimed, Profile, check
from lmcache_conformance.memory import value
from lmcache_conformance.rig import Rig, within
from lmcache_core.sdk import BackendUnavailable, Status, SupportsLeases

_ROOM = 64 << 20
_VALUE = 1 << 20


def _small(rig: Rig) -> str:
    if not rig.harness.offers("small_url"):
        raise Inconclusive("the harness gives no small store: implement small_url")
    return rig.harness.small_url(_ROOM)


@check(
    "J1",
    profile=Profile.RESILIENT,
    limit_s=300,
    fix="a full store answers REJECTED, or evicts and claims it",
)
def fill(rig: Rig) -> None:
    """A full store answers REJECTED, or evicts where it claims to; what it acknowledged and did
    not evict is whole; after a delete there is room again."""
    store = rig.open(_small(rig))
    size = rig.size(_VALUE)
    accepted: list[int] = []
    refused = 0
    for number in range(3 * _ROOM // _VALUE):
        try:
            status = rig.put({rig.key(f"f{number}"): value(number, size)}, store)[0]
        except BackendUnavailable as error:
            rig.expect(False, f"a full store raised {error!r}; answer REJECTED")
            return
        if status is Status.OK:
            accepted.append(number)
        else:
            refused += 1
            rig.expect(status is Status.REJECTED, f"a full store answered {status.name}")
            if refused > 3:
                break
    rig.expect(len(accepted) >= 8, f"a store of {_ROOM >> 20} MiB took {len(accepted)} MiB")
    evicts = store.capabilities.evicts
    if store.capabilities.capacity_reported:
        total = store.health(within(5)).total_bytes
        rig.expect(
            _ROOM // 2 <= total <= 2 * _ROOM, f"total_bytes is {total} of a store of {_ROOM} bytes"
        )
    rig.expect(evicts or refused, "three times its room was acknowledged, evicts is not claimed")
    kept = 0
    for number in accepted:
        allowed = [value(number, size), None] if evicts else [value(number, size)]
        key = rig.key(f"f{number}")
        rig.expect_one_of(key, allowed, size, "in a full store", store)
        kept += store.exists([key], within(5)) == [Status.OK]
    rig.expect(kept >= 8, f"a full store of {_ROOM >> 20} MiB keeps {kept} MiB")
    keys = [rig.key(f"f{number}") for number in accepted]
    for start in range(0, len(keys), 16):
        store.delete(keys[start : start + 16], within(10))
    end_s = time.monotonic() + 10
    while rig.put({rig.key("again"): value(7, size)}, store) != [Status.OK]:
        rig.expect(time.monotonic() < end_s, "no room after everything was deleted")
        time.sleep(0.1)
    rig.expect_value(rig.key("again"), value(7, size), "after the store was full", store)


@check(
    "J2",
    profile=Profile.RESILIENT,
    fix="count a value when it is published, and take it off at delete",
)
def used_bytes(rig: Rig) -> None:
    """Where capacity is reported, used_bytes grows with a put and falls with a delete."""
    store = rig.store
    if not rig.claims.capacity_reported and rig.harness.offers("small_url"):
        store = rig.open(_small(rig))
    if not store.capabilities.capacity_reported:
        raise NotClaimed("capacity_reported is not claimed")
    size, count = rig.size(_VALUE), 8
    keys = rig.keys(count)
    before = store.health(within(5)).used_bytes
    rig.must_put({key: value(i, size) for i, key in enumerate(keys)}, store)
    full = store.health(within(5)).used_bytes
    rig.expect(
        full - before >= count * size * 0.9,
        f"{count * size} bytes were put, used_bytes grew by {full - before}",
    )
    # A store may keep what was replaced for its last readers.
    rig.must_put({keys[0]: value(9, size)}, store)
    store.delete(keys, within(10))
    end_s = time.monotonic() + 10
    while (left := store.health(within(5)).used_bytes) - before > count * size * 0.2:
        rig.expect(
            time.monotonic() < end_s, f"all was deleted, used_bytes is {left - before} above before"
        )
        time.sleep(0.1)


@check(
    "J3", profile=Profile.RESILIENT, fix="refuse to evict or delete what another holds a lease on"
)
def leases(rig: Rig) -> None:
    """Where leases are claimed: a lease keeps a value from another's delete, not from our own, and
    expires."""
    if not rig.claims.leases:
        raise NotClaimed("leases is not claimed")
    first, second = rig.store, rig.open()
    assert isinstance(first, SupportsLeases)
    key, content = rig.key("k"), value(rig.seed, rig.size())
    rig.must_put({key: content})
    rig.expect(first.lease([key], 1.0, within(5)) == [Status.OK], "lease was not OK")
    answer = second.delete([key], within(5))
    rig.expect(answer == [Status.REJECTED], f"delete over another's lease answered {answer}")
    rig.expect_value(key, content, "under a lease")
    time.sleep(1.5)
    rig.expect(second.delete([key], within(5)) == [Status.OK], "a lease does not expire")
    rig.must_put({key: content})
    first.lease([key], 30.0, within(5))
    rig.expect(first.delete([key], within(5)) == [Status.OK], "our own lease refuses our delete")
