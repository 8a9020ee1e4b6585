"""H: what goes wrong below a connector must reach core as an answer, never as wrong bytes."""

from __future__ import annotations

import time
from typing import Any

from lmcache_conformance.checks.stalling import does_io, stalled
from lmcache_conformance.child import Child, digest
from lmcache_conformance.frame import Inconclusive, NotClaimed, Profile, Wrong, check
from lmcache_conformance.harness import TcpHarness
from lmcache_conformance.memory import value
from lmcache_conformance.rig import UNFINISHED, Rig, names, within
from lmcache_core.sdk import (
    BackendUnavailable,
    ConfigError,
    LMCacheError,
    OnExisting,
    Sharing,
    Status,
)

GRACE_S = 0.25
_MAY_RAISE = {"BackendUnavailable"}


def behind_a_proxy(rig: Rig) -> None:
    """
    Raises:
        NotClaimed: nothing stands between the connector and its store, as the I/O shows.
        Inconclusive: something does, but the harness is no `TcpHarness`.
    """
    if isinstance(rig.harness, TcpHarness):
        return
    if rig.claims.sharing is Sharing.CLUSTER:
        raise Inconclusive("sharing is cluster, but the harness is no TcpHarness")
    with Child(rig.url, rig.harness.module, rig.scratch, preload=True) as child:
        counted = does_io(rig, child)
    if counted["send"] or counted["recv"] or counted["connect"]:
        raise Inconclusive("the connector uses sockets, but the harness is no TcpHarness")
    raise NotClaimed("no store behind a socket, as a count of its system calls shows")


def expect_answer(rig: Rig, found: dict[str, Any], what: str) -> None:
    """The child's answer is a status, or an exception of the contract."""
    if "error" in found:
        rig.expect(
            found["error"] in _MAY_RAISE,
            f"{what}: raised {found['error']}: {found['message'][:200]}; answer the key, or raise "
            "BackendUnavailable",
        )


@check(
    "H1",
    profile=Profile.RESILIENT,
    fix="map a refused connection to BackendUnavailable, at open and in every call",
)
def refused(rig: Rig) -> None:
    """With the store gone, open and every call answer within the deadline, with
    BackendUnavailable or unfinished keys, and work again without being reopened when it is back."""
    behind_a_proxy(rig)
    store, key, content = rig.store, rig.key("k"), value(rig.seed, rig.size())
    rig.must_put({key: content})
    rig.proxy.faults.refuse = True
    rig.proxy.hang_up()
    for op in ("exists", "get", "put", "delete", "health"):
        started_s = time.monotonic()
        try:
            if op == "get":
                status = rig.get(key, len(content), seconds=1.0)[0].status
            elif op == "put":
                status = rig.put({rig.key("new"): content}, seconds=1.0)[0]
            elif op == "health":
                status = Status.OK if store.health(within(1.0)).ok else Status.FAILED
            else:
                status = getattr(store, op)([rig.key("other")], within(1.0))[0]
        except BackendUnavailable:
            pass
        else:
            rig.expect(status in UNFINISHED, f"{op} of a store that is gone: {status.name}")
        seconds = time.monotonic() - started_s
        rig.expect(seconds < 1.0 + GRACE_S, f"{op} of a store that is gone took {seconds:.2f} s")
    try:
        rig.open()
    except (BackendUnavailable, ConfigError):
        pass
    except Exception as error:
        raise Wrong(f"open of a store that is gone raised {error!r}") from error
    rig.proxy.faults.refuse = False
    rig.until_well(store)
    rig.expect_one_of(key, [content, None], len(content), "after the store was gone")


@check(
    "H2",
    profile=Profile.RESILIENT,
    limit_s=300,
    fix="read until the whole reply is there; close a stream that broke off",
)
def cut_during_a_get(rig: Rig) -> None:
    """A connection that breaks after any byte of a get gives the right value or no value, and the
    next get is right."""
    behind_a_proxy(rig)
    key, content = rig.key("k"), value(rig.seed, rig.size(100_000))
    rig.must_put({key: content})
    start = rig.proxy.reply_bytes
    rig.expect_value(key, content, "before any fault")
    total = rig.proxy.reply_bytes - start
    for offset in sorted({0, 1, 3, 7, total // 3, total // 2, total - 3, total - 1, *(
        range(0, total, max(1, total // 64)) if rig.full else ()
    )}):  # fmt: skip
        rig.proxy.faults.cut_reply_after_bytes = rig.proxy.reply_bytes + offset
        try:
            result, found = rig.get(key, len(content), seconds=2.0)
        except BackendUnavailable:
            pass
        else:
            fine = found == content if result.status is Status.OK else result.status in UNFINISHED
            rig.expect(fine, f"cut after byte {offset} of a reply: {result.status.name}")
        rig.proxy.faults.cut_reply_after_bytes = -1
        rig.expect_value(key, content, f"after a cut at byte {offset} of a reply")


@check(
    "H3",
    profile=Profile.RESILIENT,
    limit_s=300,
    fix="write aside and publish with one last atomic step",
)
def cut_during_a_put(rig: Rig) -> None:
    """A connection that breaks after any byte of a put leaves the old value, the new one or none,
    whole; the put says OK only when the new one is there."""
    behind_a_proxy(rig)
    size, store = rig.size(100_000), rig.store
    start = rig.proxy.sent_bytes
    rig.must_put({rig.key("first"): value(rig.seed, size)})
    total = rig.proxy.sent_bytes - start
    ends = {total // 3, total // 2, total - 200, total - 40, total - 1}
    every = range(0, total, max(1, total // 64)) if rig.full else ()
    for turn, offset in enumerate(sorted({0, 1, 20, *ends, *every})):
        key, old, new = rig.key(f"k{turn}"), value(turn, size), value(turn + 1000, size)
        rig.must_put({key: old})
        if turn % 2:
            # Now the put has to connect first, and it is a new connection that breaks.
            rig.proxy.hang_up()
        rig.proxy.faults.cut_after_bytes = rig.proxy.sent_bytes + offset
        said: Status | None = None
        try:
            said = rig.put({key: new}, store, seconds=2.0)[0]
        except BackendUnavailable:
            pass
        rig.proxy.faults.cut_after_bytes = -1
        rig.proxy.hang_up()
        stays = old if rig.claims.on_existing is OnExisting.KEEP else new
        allowed = [stays] if said is Status.OK else [old, new, None]
        rig.expect_one_of(key, allowed, size, f"a put cut after byte {offset} ({said})")


@check(
    "H4",
    profile=Profile.RESILIENT,
    limit_s=120,
    fix="hand the time that is left to every blocking call; GuardedLoop and AbandoningLoop do "
    "it for libraries without a time-out",
)
def stands_still(rig: Rig) -> None:
    """While the store stands still every call returns by its deadline + 250 ms, and works again
    afterwards."""
    key, content = rig.key("k"), value(rig.seed, rig.size(256 << 10))
    rig.must_put({key: content})
    with Child(rig.url, rig.harness.module, rig.scratch, preload=True) as child:
        child.call("get", key=key.hex(), nbytes=len(content))
        for op, arguments in (
            ("exists", {"key": key.hex()}), ("get", {"key": key.hex(), "nbytes": len(content)}),
            ("put", {"key": rig.key("new").hex(), "seed": 3, "nbytes": len(content)}),
            ("delete", {"key": rig.key("other").hex()}), ("health", {}),
        ):  # fmt: skip
            with stalled(rig, child, for_s=1.5) as arm:
                if arm is not None:
                    arm["at"] = 1
                found = child.call(op, seconds=0.3, arm=arm, **arguments)
            if arm is not None and not found.get("fired"):
                continue
            seconds = found["seconds"]
            rig.expect(
                seconds < 0.3 + GRACE_S,
                f"{op} with a deadline of 0.3 s returned after {seconds:.2f} s",
            )
            expect_answer(rig, found, f"{op} of a store that stands still")
            if arm is None and "error" not in found:
                rig.expect(
                    found["status"] in {each.name for each in UNFINISHED},
                    f"{op} of a store that stands still answered {found['status']}",
                )
            time.sleep(0 if arm is None else 1.3)
        end_s = time.monotonic() + 10
        while True:
            found = child.call("get", key=key.hex(), nbytes=len(content))
            if found.get("digest") == digest(content):
                break
            wrong = found.get("status") in ("OK", "MISS")
            rig.expect(not wrong, f"after a stall get_into answered {found}")
            rig.expect(time.monotonic() < end_s, "after a stall the value does not come back")
            time.sleep(0.1)
        new = child.call("get", key=rig.key("new").hex(), nbytes=len(content))
        whole = (digest(value(3, len(content))), None)
        rig.expect(new.get("digest") in whole, "a put during a stall left another value")


@check(
    "H5",
    profile=Profile.RESILIENT,
    fix="a lost reply leaves the key in doubt: answer TIMED_OUT and close that connection",
)
def replies_are_lost(rig: Rig) -> None:
    """On a half-open connection (the store acts, its replies are lost) calls end by their
    deadline, and no later call takes an earlier one's reply for its own."""
    behind_a_proxy(rig)
    size = rig.size()
    first, second = rig.key("a"), rig.key("b")
    contents = {first: value(1, size), second: value(2, size)}
    rig.must_put(contents)
    new = value(3, size)
    rig.proxy.faults.mute = True
    started_s = time.monotonic()
    try:
        status = rig.put({first: new}, seconds=0.5)[0]
        rig.expect(status in UNFINISHED, f"a put without a reply answered {status.name}")
        status = rig.get(second, size, seconds=0.5)[0].status
        rig.expect(status in UNFINISHED, f"a get without a reply answered {status.name}")
    except BackendUnavailable:
        pass
    seconds = time.monotonic() - started_s
    rig.expect(seconds < 1.0 + 2 * GRACE_S, f"calls without a reply took {seconds:.2f} s")
    rig.proxy.faults.mute = False
    rig.proxy.hang_up()
    rig.until_well(rig.store)
    for _ in range(3):
        rig.proxy.faults.stalled = True
        try:
            rig.get(first, size, seconds=0.2)
        except BackendUnavailable:
            pass
        rig.proxy.faults.stalled = False
        rig.expect_value(second, contents[second], "after a reply that came too late")
    rig.expect_value(second, contents[second], "after replies were lost")
    rig.expect_one_of(first, [contents[first], new], size, "after replies were lost")


@check(
    "H6",
    profile=Profile.RESILIENT,
    fix="never count round trips as time, and never take one read for one reply: a slow store is "
    "a store",
)
def slow_store(rig: Rig) -> None:
    """A store that answers 10 ms late, or whose answers arrive in small pieces, is slow, not
    wrong."""
    behind_a_proxy(rig)
    keys, size, small = rig.keys(4), rig.size(), rig.size(64)
    rig.proxy.faults.delay_s = 0.01
    contents = {key: value(i, size) for i, key in enumerate(keys)}
    for key, content in contents.items():
        rig.must_put({key: content})
    for key, content in contents.items():
        rig.expect_value(key, content, "from a slow store")
    rig.proxy.faults.delay_s = 0.0
    rig.proxy.faults.reply_piece_bytes = max(1, small // 128)
    for key in (keys[0], rig.key("new")):
        content = value(9, small)
        rig.expect(rig.store.delete([key], within(10)) == [Status.OK], "delete from a slow store")
        rig.must_put({key: content})
        rig.expect_value(key, content, "in small pieces")
        there = rig.store.exists([key, rig.key("none")], within(10))
        rig.expect(there == [Status.OK, Status.MISS], f"exists in small pieces: {names(there)}")
        rig.expect_absent(rig.key("none"), "in small pieces")
    rig.expect(rig.store.health(within(10)).ok, "a slow store is not healthy")


@check(
    "H10",
    profile=Profile.RESILIENT,
    limit_s=120,
    fix="connect again when the old connection is dead; do not wait for a reopen",
)
def server_restart(rig: Rig) -> None:
    """After the store's server was killed and started again the connector works without being
    reopened, and what is there is whole."""
    if not (rig.harness.offers("kill") and rig.harness.offers("restart")):
        behind_a_proxy(rig)
        raise Inconclusive("the harness offers no kill and restart")
    keys, size = rig.keys(4), rig.size(256 << 10)
    contents = {key: value(i, size) for i, key in enumerate(keys)}
    rig.must_put(contents)
    rig.harness.kill()
    started_s = time.monotonic()
    try:
        status = rig.get(keys[0], size, seconds=1.0)[0].status
        rig.expect(status in UNFINISHED, f"a get from a killed server answered {status.name}")
    except BackendUnavailable:
        pass
    seconds = time.monotonic() - started_s
    rig.expect(seconds < 1.0 + GRACE_S, f"a get from a killed server took {seconds:.2f} s")
    rig.harness.restart()
    rig.until_well(rig.store)
    for key, content in contents.items():
        # A store of several nodes may need a moment more for some keys.
        status, found = rig.get_when_well(key, size)
        rig.expect_allowed(status, found, [content, None], "after a restart of the server")


@check(
    "H11",
    profile=Profile.RESILIENT,
    fix="frame and checksum values, or do not claim `checksums`: core checks",
)
def damaged_values(rig: Rig) -> None:
    """Where ``checksums`` is claimed, a value with a flipped bit, a lost tail or a lost part is
    CORRUPT or MISS; else core's envelope refuses what comes."""
    from lmcache_conformance.sealing import sealed, unseal

    offered = [each for each in ("corrupt", "truncate", "lose") if rig.harness.offers(each)]
    if not offered:
        if rig.claims.checksums:
            raise Inconclusive("checksums is claimed; the harness offers no corrupt and truncate")
        raise NotClaimed("checksums is not claimed")
    for damage in offered:
        key, content = rig.key(damage), sealed(value(rig.seed, 64 << 10))
        rig.must_put({key: content})
        getattr(rig.harness, damage)(key)
        try:
            result, found = rig.get(key, len(content))
        except LMCacheError as error:
            raise Wrong(f"{damage}: raised {error!r}; answer CORRUPT") from error
        if result.status is Status.OK:
            rig.expect(not rig.claims.checksums, f"{damage}: OK, though checksums is claimed")
            rig.expect(not unseal(found), f"{damage}: core's envelope takes the damaged value")
        else:
            fine = (Status.CORRUPT, Status.MISS, Status.FAILED)
            rig.expect(result.status in fine, f"{damage}: answered {result.status.name}")
        again = sealed(value(rig.seed + 1, 64 << 10))
        rig.store.delete([key], within(5))
        rig.must_put({key: again})
        rig.expect_value(key, again, f"stored again after {damage}")
    if not rig.claims.checksums:
        raise NotClaimed("checksums is not claimed; core's envelope refuses what was damaged")
