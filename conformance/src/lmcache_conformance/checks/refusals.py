"""H12 and H13: what a store's own errors, and damage to one value, may not do to the rest."""

from __future__ import annotations

import time

from lmcache_conformance.checks.faults import GRACE_S
from lmcache_conformance.frame import NotClaimed, Profile, Wrong, check
from lmcache_conformance.memory import Memory, value
from lmcache_conformance.rig import Rig, names, within
from lmcache_conformance.sealing import sealed, unseal
from lmcache_core.sdk import (
    BackendUnavailable,
    ConfigError,
    GetResult,
    LMCacheError,
    Status,
    SupportsScan,
)

_LARGE = 5 << 20
"""Enough for several pieces of a store that splits its values."""
_FALSE = (Status.OK, Status.MISS)
_LIMIT_S = 2.0


@check(
    "H12",
    profile=Profile.RESILIENT,
    fix="settle each key by itself; after a reply of another kind or size read on from a clean "
    "connection; a head whose parts are gone goes too",
)
def damage_stays_with_its_key(rig: Rig) -> None:
    """A value of which the store lost, changed or replaced a part harms no other key of the batch,
    is not absent for one operation and there for another, and can be stored again."""
    if not rig.harness.offers("damages"):
        raise NotClaimed("the harness offers no damages")
    before, after = rig.key("before"), rig.key("zafter")
    around = {before: value(1, rig.size()), after: value(2, rig.size())}
    rig.must_put(around)
    content, again = sealed(value(3, _LARGE)), value(4, rig.size())
    for number, (damage, do) in enumerate(rig.harness.damages().items()):
        key = rig.key(f"k{number}")
        rig.must_put({key: content})
        do(key)
        memory = Memory([len(around[before]), len(content), len(around[after])])
        try:
            results = rig.store.get_into([before, key, after], memory.buffers(), within(4))
        except LMCacheError as error:
            raise Wrong(f"{damage}: raised {error!r}; answer CORRUPT") from error
        rig.expect_answers(results, 3, GetResult, "get_into")
        for index, each in ((0, before), (2, after)):
            whole = memory.bytes_of(index) == around[each]
            rig.expect(
                results[index].status is Status.OK and whole,
                f"{damage}: the key beside it was answered {results[index].status.name}",
            )
        rig.expect(memory.canaries_intact(), f"{damage}: wrote outside of the targets")
        _expect_no_value(rig, key, damage, results[1].status, memory.bytes_of(1))
        answers = rig.store.delete([key], within(5))
        rig.expect(answers == [Status.OK], f"{damage}: delete answered {names(answers)}")
        rig.must_put({key: again})
        rig.expect_value(key, again, f"stored again after {damage}")
        rig.store.delete([key], within(5))


def _expect_no_value(rig: Rig, key: bytes, damage: str, status: Status, found: bytes) -> None:
    """A damaged value is no right answer, and one that is a MISS is absent for all."""
    if status is Status.OK:
        rig.expect(not unseal(found), f"{damage}: OK with the bytes that were damaged")
        return
    fine = (Status.CORRUPT, Status.MISS, Status.FAILED)
    rig.expect(status in fine, f"{damage}: answered {status.name}")
    if status is not Status.MISS:
        return
    there = rig.store.exists([key], within(5))
    rig.expect(there == [Status.MISS], f"{damage}: MISS for get, {names(there)} for exists")
    if rig.claims.scan and isinstance(rig.store, SupportsScan):
        listed = [entry.key for entry in rig.store.scan(key, within(10))]
        rig.expect(not listed, f"{damage}: MISS for get, but a scan lists it")


@check(
    "H13",
    profile=Profile.RESILIENT,
    fix="read every error that the store may answer: none of them is a MISS, and none is an OK",
)
def store_refuses(rig: Rig) -> None:
    """While the store refuses with errors of its own (rights taken away, a login asked for, no
    writes) no answer is OK or MISS, what it does not refuse works, nothing that is there is harmed,
    and all works again after."""
    if not rig.harness.offers("refusals"):
        raise NotClaimed("the harness offers no refusals")
    for number, (refusal, refusing) in enumerate(rig.harness.refusals().items()):
        kept = {rig.key(f"{number}a"): value(1, rig.size()), rig.key(f"{number}b"): value(2, 4096)}
        new, content = rig.key(f"{number}new"), value(3, rig.size())
        rig.must_put(kept)
        with refusing as refused:
            for op in refused:
                started_s = time.monotonic()
                _expect_refused(rig, op, list(kept), new, content, f"{op} while {refusal}")
                seconds = time.monotonic() - started_s
                late = f"{op} while {refusal} took {seconds:.2f} s"
                rig.expect(seconds < _LIMIT_S + GRACE_S or op == "open", late)
                if "get" not in refused:
                    for key, old in kept.items():
                        rig.expect_value(key, old, f"not refused, after {op} while {refusal}")
        rig.until_well(rig.store)
        for key, old in kept.items():
            rig.expect_one_of(key, [old], len(old), f"after {refusal}")
        rig.expect_one_of(new, [content, None], len(content), f"after {refusal}")
        rig.must_put({new: content})
        rig.expect_value(new, content, f"put after {refusal}")


def _expect_refused(
    rig: Rig, op: str, kept: list[bytes], new: bytes, content: bytes, what: str
) -> None:
    """One operation on what is there, and a put of what is not, is neither OK nor MISS."""
    store, context = rig.store, within(_LIMIT_S)
    try:
        if op == "open":
            rig.open()
            raise Wrong(f"{what} gave a connector")
        if op == "health":
            rig.expect(not store.health(context).ok, f"{what} is ok")
            return
        if op == "scan":
            assert isinstance(store, SupportsScan)
            raise Wrong(f"{what} ended with {len(list(store.scan(kept[0], context)))} entries")
        if op == "get":
            memory = Memory([rig.size()] * len(kept))
            results = store.get_into(kept, memory.buffers(), context)
            statuses = [each.status for each in results]
        elif op == "put":
            statuses = rig.put({new: content}, store, seconds=_LIMIT_S)
        else:
            statuses = getattr(store, op)(kept, context)
    except (BackendUnavailable, ConfigError):
        return
    except OSError as error:
        # What a scan meets on its way has no key that could be answered.
        rig.expect(op == "scan", f"{what} raised {error!r}")
        return
    said = f"{what} answered {names(statuses)}"
    rig.expect(statuses and not set(statuses) & set(_FALSE), said)
