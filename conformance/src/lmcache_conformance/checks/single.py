"""B: one key at a time."""

from __future__ import annotations

import time

from lmcache_conformance.frame import NotClaimed, check
from lmcache_conformance.memory import value
from lmcache_conformance.rig import Rig, differ, within
from lmcache_core.sdk import GetResult, OnExisting, Sharing, Status

_AGE_S = 90.0
"""Of a value that was put in this check at most; clocks of a store may be coarse."""


@check("B1", fix="return exactly the bytes and the size that put_from was given")
def round_trip(rig: Rig) -> None:
    """What was put comes back, whole, with its size, and exists says so."""
    key, content = rig.key("k"), value(rig.seed, rig.size(3 * 4096))
    rig.expect(rig.store.exists([key], within(5)) == [Status.MISS], "a new key exists")
    rig.must_put({key: content})
    rig.expect(rig.store.exists([key], within(5)) == [Status.OK], "a key that was put is absent")
    rig.expect_value(key, content, "after put_from answered OK")


@check("B2", fix="absent is MISS for get and exists, and OK for delete")
def absent(rig: Rig) -> None:
    """An absent key is MISS; its delete is OK."""
    key = rig.key("none")
    rig.expect_absent(key, "a key that nobody put")
    rig.expect(rig.store.delete([key], within(5)) == [Status.OK], "delete of an absent key")
    rig.expect_absent(key, "after a delete of an absent key")


@check("B3", fix="declare on_existing as it is; never delete before the new value is whole")
def put_of_a_present_key(rig: Rig) -> None:
    """A put of a present key answers OK and leaves what ``on_existing`` declares."""
    key, old, new = rig.key("k"), value(rig.seed, rig.size()), value(rig.seed + 1, rig.size())
    shorter = value(rig.seed + 2, rig.size(4096))
    rig.must_put({key: old})
    keeps = rig.claims.on_existing is OnExisting.KEEP
    for content in (new, shorter):
        rig.must_put({key: content})
        rig.expect_value(key, old if keeps else content, f"on_existing={rig.claims.on_existing}")


@check("B4", fix="delete must be visible to the next get of the same connector")
def delete(rig: Rig) -> None:
    """A deleted key is absent; deleting it again is OK; it can be put again."""
    key, content = rig.key("k"), value(rig.seed, rig.size())
    rig.must_put({key: content})
    for when in ("a delete", "a second delete"):
        rig.expect(rig.store.delete([key], within(5)) == [Status.OK], f"{when} was not OK")
        rig.expect_absent(key, f"after {when}")
        rig.expect(rig.store.exists([key], within(5)) == [Status.MISS], f"exists after {when}")
    again = value(rig.seed + 1, rig.size())
    rig.must_put({key: again})
    rig.expect_value(key, again, "put again after a delete")


@check("B5", fix="write to the start of the target; nbytes is the value's size, not the target's")
def larger_target(rig: Rig) -> None:
    """A larger target is fine: nbytes says the value's size."""
    key, content = rig.key("k"), value(rig.seed, rig.size())
    rig.must_put({key: content})
    for nbytes in (len(content) + rig.claims.alignment, 3 * len(content)):
        result, found = rig.get(key, nbytes)
        rig.expect(
            result == GetResult(Status.OK, len(content)),
            f"a target of {nbytes} for {len(content)} bytes gave {result}",
        )
        rig.expect(found == content, f"a larger target got {differ(found, content)}")


@check("B6", fix="compare the sizes before the first byte is moved")
def smaller_target(rig: Rig) -> None:
    """A smaller target is SIZE_MISMATCH with the true size where known, nothing beside it is
    touched, and the value stays."""
    key, content = rig.key("k"), value(rig.seed, rig.size(2 * 4096))
    rig.must_put({key: content})
    for nbytes in (rig.claims.alignment, len(content) - rig.claims.alignment):
        result, _ = rig.get(key, nbytes)
        rig.expect(
            result.status is Status.SIZE_MISMATCH,
            f"a target of {nbytes} for {len(content)} bytes gave {result.status.name}",
        )
        rig.expect(
            result.nbytes in (0, len(content)),
            f"SIZE_MISMATCH says nbytes={result.nbytes}, true are {len(content)}; 0 is unknown",
        )
    rig.expect_value(key, content, "after a SIZE_MISMATCH")


@check("B7", fix="publish before put_from answers OK; invalidate what a client caches")
def another_client_sees_it(rig: Rig) -> None:
    """What one connector was told is stored, replaced or deleted, another one sees so."""
    if rig.claims.sharing is Sharing.PROCESS:
        first, second = rig.store, rig.open()
        rig.must_put({rig.key("k"): value(rig.seed, rig.size())}, first)
        rig.get(rig.key("k"), rig.size(), second)
        raise NotClaimed("sharing is process")
    first, second = rig.store, rig.open()
    key, old, new = rig.key("k"), value(rig.seed, rig.size()), value(rig.seed + 1, rig.size())
    rig.expect_absent(key, "before the put", second)
    rig.must_put({key: old}, first)
    rig.expect_value(key, old, "from a second connector", second)
    if rig.claims.on_existing is OnExisting.REPLACE:
        rig.must_put({key: new}, first)
        rig.expect_value(key, new, "from a second connector, replaced", second)
    rig.store.delete([key], within(5))
    rig.expect_absent(key, "from a second connector, after a delete", second)


@check("B8", fix="answer from the store, not from what this client remembers")
def the_store_has_it(rig: Rig) -> None:
    """The store itself holds what was put, and the connector reads what the store holds."""
    if not rig.harness.offers("raw_get"):
        raise NotClaimed("the harness offers no raw_get")
    key, content, behind = rig.key("k"), value(rig.seed, rig.size()), rig.key("behind")
    rig.must_put({key: content})
    rig.expect(rig.harness.raw_get(key) == content, "the store holds something else than was put")
    if rig.harness.offers("raw_put"):
        rig.expect_absent(behind, "before it is stored behind the connector's back")
        rig.harness.raw_put(behind, content)
        rig.expect_value(behind, content, "stored behind the connector's back")


@check("B9", fix="take status from the value itself: exists and get must agree at rest")
def scan_lists_what_is_there(rig: Rig) -> None:
    """A scan gives every whole value of a prefix with its size and, where the store knows, when it
    was last used, and nothing that is no value."""
    from lmcache_core.sdk import SupportsScan

    if not rig.claims.scan:
        raise NotClaimed("scan is not claimed")
    assert isinstance(rig.store, SupportsScan)
    step = rig.claims.alignment
    sizes = {rig.key(f"aa{i}"): rig.size() + i * step for i in range(20)}
    rig.must_put({key: value(i, size) for i, (key, size) in enumerate(sizes.items())})
    rig.must_put({rig.key("ab"): value(1, rig.size())})
    gone = rig.key("aa3")
    rig.store.delete([gone], within(5))
    sizes.pop(gone)
    if rig.harness.offers("litter"):
        rig.harness.litter()
    listed = list(rig.store.scan(rig.key("aa"), within(10)))
    found = {entry.key: entry.nbytes for entry in listed}
    rig.expect(found == sizes, f"scan gave {len(found)} entries, {len(sizes)} are there")
    for entry in listed:
        age_s = time.time() - entry.used_at_s if entry.used_at_s else 0.0
        rig.expect(abs(age_s) < _AGE_S, f"scan says that a new value was used {age_s:.0f} s ago")
    for entry in rig.store.scan(b"", within(30)):
        status = rig.store.exists([entry.key], within(5))[0]
        rig.expect(status is Status.OK, f"scan gave {entry.key!r}, which is {status.name}")
        rig.expect(
            rig.get(entry.key, rig.size(max(1, entry.nbytes)))[0].nbytes == entry.nbytes,
            f"scan gave {entry.key!r} with {entry.nbytes} bytes, it has others",
        )
