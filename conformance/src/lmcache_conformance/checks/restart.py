"""I: what an acknowledged put survives, by the claim of durability."""

from __future__ import annotations

from lmcache_conformance.checks.stalling import does_io
from lmcache_conformance.child import Child, Died, digest
from lmcache_conformance.frame import Inconclusive, NotClaimed, Profile, Wrong, check
from lmcache_conformance.memory import value
from lmcache_conformance.rig import Rig, within
from lmcache_conformance.shim import Action, mask_of
from lmcache_core.sdk import Durability

_ORDER = (Durability.NONE, Durability.PROCESS, Durability.SERVER, Durability.HOST)
_WRITES = mask_of("write", "sync", "open", "name", "send")


def _positions(rig: Rig, count: int) -> list[int]:
    """Every call of ``count`` in the full plan, else at most 24 spread over them."""
    if rig.full or count <= 24:
        return list(range(1, count + 1))
    return sorted({1 + i * (count - 1) // 23 for i in range(24)})


def _needs(rig: Rig, least: Durability) -> None:
    claimed = rig.claims.durability
    if _ORDER.index(claimed) < _ORDER.index(least):
        raise NotClaimed(f"durability is {claimed.value}")


def _expect_kept(rig: Rig, keys: list[bytes], size: int, what: str) -> None:
    """A new connector finds every value, unless the store may evict."""
    again = rig.open()
    for number, key in enumerate(keys):
        allowed = [value(number, size), None] if rig.claims.evicts else [value(number, size)]
        rig.expect_one_of(key, allowed, size, what, again)


@check("I1", profile=Profile.DURABLE, fix="write out before put_from answers OK, not in close()")
def process_exit(rig: Rig) -> None:
    """From ``process`` on: what a process was told is stored is there after it ended, with and
    without close()."""
    _needs(rig, Durability.PROCESS)
    keys, size = rig.keys(8), rig.size(64 << 10)
    for start, closes in ((0, True), (4, False)):
        with Child(rig.url, rig.harness.module, rig.scratch) as child:
            for number in range(start, start + 4):
                found = child.call("put", key=keys[number].hex(), seed=number, nbytes=size)
                rig.expect(found.get("status") == "OK", f"put_from in a child answered {found}")
            if closes:
                child.call("close")
            try:
                child.call("exit")
            except Died:
                pass
    _expect_kept(rig, keys, size, "after the writing process ended")


@check(
    "I2", profile=Profile.DURABLE, fix="hold no acknowledged value in memory of the process alone"
)
def process_killed(rig: Rig) -> None:
    """From ``process`` on: what a process was told is stored is there after its SIGKILL."""
    _needs(rig, Durability.PROCESS)
    keys, size = rig.keys(8), rig.size(64 << 10)
    with Child(rig.url, rig.harness.module, rig.scratch) as child:
        for number, key in enumerate(keys):
            found = child.call("put", key=key.hex(), seed=number, nbytes=size)
            rig.expect(found.get("status") == "OK", f"put_from in a child answered {found}")
        child.kill()
    _expect_kept(rig, keys, size, "after the writing process was killed")


@check(
    "I3",
    profile=Profile.DURABLE,
    limit_s=300,
    fix="publish with the last system call: rename, or one transaction",
)
def killed_at_every_call(rig: Rig) -> None:
    """A process killed before the n-th system call of a put, for every n, leaves the old value,
    the new one or none, whole; a new connector opens and works."""
    _needs(rig, Durability.PROCESS)
    size = rig.size(64 << 10)
    with Child(rig.url, rig.harness.module, rig.scratch, preload=True) as child:
        does_io(rig, child)
        found = child.call(
            "put", key=rig.key("count").hex(), seed=1, nbytes=size,
            arm={"action": int(Action.COUNT), "mask": _WRITES},
        )  # fmt: skip
        count = sum(found["seen"].values())
    if not count:
        raise Inconclusive("no writing system call of a put could be hooked")
    stored, used = rig.harness.stored(), []
    for number in _positions(rig, count):
        used.append(rig.key(f"k{number}"))
        key, old, new = rig.key(f"k{number}"), value(number, size), value(number + 1000, size)
        rig.must_put({key: old})
        with Child(rig.url, rig.harness.module, rig.scratch, preload=True) as child:
            child.call("put", key=rig.key("warm").hex(), seed=1, nbytes=size)
            arm = {"action": int(Action.KILL), "at": number, "mask": _WRITES}
            try:
                child.call("put", key=key.hex(), seed=number + 1000, nbytes=size, arm=arm)
            except Died:
                pass
        allowed = [old, new, None] if rig.claims.evicts else [old, new]
        again = rig.open()
        rig.expect_one_of(key, allowed, size, f"killed before call {number} of {count}", again)
        rig.must_put({key: old}, again)
        again.close()
    again = rig.open()
    for key in used:
        again.delete([key], within(5))
    left = rig.harness.stored() - stored
    rig.expect(left <= 2, f"killed writers left {left} files that a new connector does not remove")


@check(
    "I4", profile=Profile.DURABLE, fix="claim server only when the server writes before it answers"
)
def server_killed(rig: Rig) -> None:
    """From ``server`` on: what was acknowledged is there after the server was killed."""
    _needs(rig, Durability.SERVER)
    if rig.claims.durability is Durability.HOST and not rig.harness.offers("kill"):
        raise NotClaimed("there is no server")
    if not (rig.harness.offers("kill") and rig.harness.offers("restart")):
        raise Inconclusive("durability is claimed over a restart, the harness offers no kill")
    keys, size = rig.keys(8), rig.size(64 << 10)
    for number, key in enumerate(keys):
        rig.must_put({key: value(number, size)})
    rig.harness.kill()
    rig.harness.restart()
    _expect_kept(rig, keys, size, "after the server was killed")


@check("I5", profile=Profile.DURABLE, fix="fsync the file, then the directory, before answering OK")
def synced_before_ok(rig: Rig) -> None:
    """For ``host``: a put syncs what it wrote, and the name it gave, before it answers."""
    _needs(rig, Durability.HOST)
    with Child(rig.url, rig.harness.module, rig.scratch, preload=True) as child:
        counted = does_io(rig, child)
        seen = [
            child.call(
                "put",
                key=rig.key(f"k{number}").hex(),
                seed=number,
                nbytes=rig.size(),
                arm={"action": int(Action.COUNT)},
            )["seen"]
            for number in range(8)
        ]
    if not counted["write"]:
        raise Inconclusive("no write of this library could be hooked")
    for each in seen:
        due = 1 + each["name"]
        rig.expect(
            each["sync"] >= due,
            f"a put that gave {each['name']} names made {each['sync']} fsync calls, {due} are "
            "needed: the data, and the directory of each name",
        )


@check("I6", profile=Profile.DURABLE, fix="rebuild what the connector knows from the store at open")
def scan_after_reopen(rig: Rig) -> None:
    """From ``process`` on, where scan is claimed: a new connector's scan lists what is stored."""
    from lmcache_core.sdk import SupportsScan

    _needs(rig, Durability.PROCESS)
    if not rig.claims.scan:
        raise NotClaimed("scan is not claimed")
    size = rig.size()
    first = rig.open()
    keys = [rig.key(f"scan{i}") for i in range(10)]
    rig.must_put({key: value(i, size) for i, key in enumerate(keys)}, first)
    first.close()
    again = rig.open()
    assert isinstance(again, SupportsScan)
    found = {each.key: each.nbytes for each in again.scan(rig.key("scan"), within(10))}
    missing = len(set(keys) - set(found))
    rig.expect(
        rig.claims.evicts or not missing, f"a new connector's scan lacks {missing} of {len(keys)}"
    )
    if set(found.values()) - {size}:
        raise Wrong(f"a new connector's scan says sizes {set(found.values())}, stored are {size}")
    rig.expect(digest(value(0, size)) == digest(rig.get(keys[0], size, again)[1]), "value differs")
