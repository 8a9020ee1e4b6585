"""T14 to T17: limits, cancel, close, and nothing left behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial

from lmcache_conformance.channels.counted import Counted
from lmcache_conformance.channels.guarding import QUIET_S
from lmcache_conformance.channels.rig import CLOSE_SLACK_S, ChannelRig, Pair
from lmcache_conformance.channels.sides import MIB, SLACK_S, Side, Stream, until, within, words
from lmcache_conformance.frame import Inconclusive, Wrong, check
from lmcache_core.sdk import (
    CLOSE_LIMIT_S,
    Access,
    BackendClosed,
    Buffer,
    ContractViolation,
    Grant,
    PeerRefused,
    Piece,
    Status,
)

LARGE = 24 * MIB


@check("T14", fix="end threads, files and records of a peer, a grant and a transfer with it",
       limit_s=180.0)  # fmt: skip
def nothing_is_left(rig: ChannelRig) -> None:
    """500 times connect, transfer and disconnect, and 2,000 transfers, leave no more files, threads
    or memory; a grant that was revoked holds its spans no more; after close all is gone."""
    first = Counted()
    a, b = rig.open(MIB), rig.open(MIB)
    for _ in range(3):
        _round(rig, a, b)
    rounds, transfers = (60, 300) if rig.quick else (500, 2000)
    before = Counted()
    for _ in range(rounds):
        _round(rig, a, b)
    left = before.grown(rss_bytes=32 * MIB)
    if left:
        raise Wrong(f"{rounds} times connect and disconnect: {left}")
    pair = rig.join(a, b)
    grant = b.grant(pair.a_name, (0, 4096))
    a.must_move(pair.b_name, grant, 0, 4096, 0, 0)
    before = Counted()
    for _ in range(transfers):
        a.must_move(pair.b_name, grant, 0, 4096, 0, 0)
    left = before.grown(rss_bytes=16 * MIB)
    if left:
        raise Wrong(f"{transfers} transfers: {left}")
    b.revoke(grant)
    _spans_go(pair)
    for side in (a, b):
        rig.close(side)
    left = first.grown(fds=4)
    if left:
        raise Wrong(f"after close: {left}")


def _round(rig: ChannelRig, a: Side, b: Side) -> None:
    pair = rig.join(a, b)
    lost = len(b.lost)
    grant = b.grant(pair.a_name, (0, 4096))
    a.must_move(pair.b_name, grant, 0, 4096, 0, 0)
    a.channel.disconnect(pair.b_name)
    b.revoke(grant)
    if not until(lambda: len(b.lost) > lost, 3.0):
        raise Wrong("a peer disconnected, and `lost` was not told within 3 s")
    b.told.clear()
    b.lost.clear()
    if a.lost:
        raise Wrong("`lost` was told to the side that disconnected")


def _spans_go(pair: Pair) -> None:
    spans = [pair.b.arena.buffer(0, 64) for _ in range(20)]
    before = sum(sys.getrefcount(span) for span in spans)
    for _ in range(10):
        made = pair.b.channel.grant(pair.a_name, spans, access=Access.WRITE, lease_s=60)
        pair.a.must_move(pair.b_name, made, 0, 64, 0, 0)
        pair.b.revoke(made)
    if not until(lambda: sum(sys.getrefcount(span) for span in spans) <= before, 2.0):
        raise Wrong("spans of grants that were revoked are still held")


@check("T15", fix="look at the limits before anything is sent or touched")
def limits_are_kept(rig: ChannelRig) -> None:
    """Over max_pieces or max_message_bytes, or with memory that is not registered: a
    ContractViolation, nothing touched; over max_transfers REJECTED, over max_peers
    PeerRefused("full"); exactly at the limit all works."""
    pair = rig.pair()
    a, b, claims = pair.a, pair.b, rig.claims()
    grant = b.grant(pair.a_name, (0, 4096))
    longest = b"m" * claims.max_message_bytes
    found = a.move(pair.b_name, grant, [(0, 1, 0, 0)], notification=longest)
    if found != [Status.OK] or a.channel.notify(pair.b_name, longest) is not Status.OK:
        raise Wrong("a notification of exactly max_message_bytes was not taken")
    if not until(lambda: [text for _, text in b.told].count(longest) == 2):
        raise Wrong("a notification of exactly max_message_bytes has not come")
    if a.channel.notify(pair.b_name, longest + b"m") is not Status.REJECTED:
        raise Wrong("notify over max_message_bytes was not REJECTED")
    before = a.arena.array.copy(), b.arena.array.copy()
    many = claims.max_pieces + 1
    strange = bytearray(64)
    outside = Buffer(memoryview(strange), id(strange), 64)
    region = a.arena.region
    edge = Buffer(a.arena.buffer(0, 64).view, region.address + region.nbytes - 63, 64)
    ok = Piece(a.arena.buffer(0, 1), 0)
    calls: dict[str, tuple[list[Piece], bytes]] = {
        "over max_pieces": ([ok] * many, b""),
        "over max_message_bytes": ([ok], longest + b"m"),
        "from memory that is not registered": ([ok, Piece(outside, 0)], b""),
        "over a region's end": ([Piece(edge, 0)], b""),
    }
    for call in (a.channel.write, a.channel.read):
        for what, (pieces, message) in calls.items():
            run = partial(call, pair.b_name, grant.ticket, pieces, within(5), notification=message)
            _violates(run, f"a {call.__name__} {what}")
    spans = [b.arena.buffer(0, 1)]
    for what, bad in {"over max_pieces": spans * many, "of other memory": [outside]}.items():
        grants = partial(b.channel.grant, pair.a_name, bad, access=Access.READ, lease_s=1)
        _violates(grants, f"a grant {what}")
    time.sleep(0.1)
    told = a.arena.changed(before[0]) or b.arena.changed(before[1])
    if told:
        raise Wrong(f"calls over a limit: {told}")
    a.must_move(pair.b_name, grant, 0, 64, 0, 0)
    _transfers_at_once(rig)
    _peers_at_once(rig)


def _violates(call: Callable[[], object], what: str) -> None:
    try:
        call()
    except ContractViolation:
        return
    raise Wrong(f"{what} was no ContractViolation")


def _transfers_at_once(rig: ChannelRig) -> None:
    side, most = rig.open(LARGE), rig.claims().max_transfers
    peer = rig.peer(LARGE)
    name, there = rig.reach(side, peer)
    ticket = peer.grant(there, 0, LARGE)
    peer.freeze()
    started = [side.start(name, ticket, [(0, LARGE, 0, 0)], seconds=1.0) for _ in range(most + 4)]
    found = [side.answers(each, 1, 1.0)[0] for each in started]
    if found[most:] != [Status.REJECTED] * 4 and not rig.claims().one_sided:
        raise Wrong(f"beside {most} transfers: {words(found[most:])}, due is REJECTED")
    if Status.REJECTED in found[:most]:
        raise Wrong(f"one of max_transfers = {most} was REJECTED")
    peer.close()


def _peers_at_once(rig: ChannelRig) -> None:
    most, options = rig.claims().max_peers, None
    if any(each.name == "max_peers" for each in rig.plugin.options):
        most, options = 2, {"max_peers": "2"}
    elif most > 16:
        raise Inconclusive(f"max_peers is {most}, and no option of that name makes it less")
    server = rig.open(MIB, options=options)
    # Who is full is the server: each of the others has one peer only.
    named = [(side, side.connect(server)) for side in (rig.open(MIB) for _ in range(most))]
    for side, name in named:
        rig.introduce(side, name, server)
    for _ in range(3):
        late = rig.open(MIB)
        try:
            late.connect(server, 3.0)
        except PeerRefused as error:
            if error.reason != "full":
                raise Wrong(f"over max_peers it was refused for {error.reason!r}") from error
        else:
            raise Wrong(f"max_peers is {most}, and one more was taken")
    side, name = named[0]
    side.channel.disconnect(name)
    if not until(lambda: server.lost, 3.0):
        raise Wrong("a peer disconnected, and `lost` was not told")
    rig.join(late, server)


@check("T16", fix="let every wait look whether it is still wanted; quiesce is cancel and revoke of "
       "one peer")  # fmt: skip
def cancel_and_quiesce(rig: ChannelRig) -> None:
    """A transfer that is cancelled ends soon, with what is not there TIMED_OUT; quiesce ends our
    transfers and the peer's grants, nothing is touched after it, and both stay connected."""
    side, peer = rig.open(LARGE), rig.peer(LARGE)
    name, there = rig.reach(side, peer)
    ticket = peer.grant(there, 0, LARGE)
    peer.freeze()
    for end in ("cancel", "quiesce"):
        started = [
            side.start(name, ticket, [(0, LARGE, 0, 0)], seconds=60, notification=b"cancelled")
            for _ in range(2)
        ]
        time.sleep(0.1)
        started_s = time.monotonic()
        if end == "cancel":
            for each in reversed(started):
                side.channel.cancel(each)
        else:
            side.channel.quiesce(name, within(2.0))
        found = [side.answers(each, 1, 2.0)[0] for each in started]
        if not set(found) <= {Status.TIMED_OUT, Status.ABANDONED} and not rig.claims().one_sided:
            raise Wrong(f"after {end}: {words(found)}")
        if time.monotonic() - started_s > 2.0 + SLACK_S:
            raise Wrong(f"after {end} the transfers took {time.monotonic() - started_s:.1f} s")
    peer.thaw()
    if not until(lambda: side.move(name, ticket, [(0, 64, 0, 0)]) == [Status.OK], 5.0):
        raise Wrong("after cancel and quiesce a write to the peer is not OK within 5 s")
    peer.close()
    _quiet(rig)


def _quiet(rig: ChannelRig) -> None:
    pair = rig.pair(16 * MIB)
    a, b = pair.a, pair.b
    grants = [b.grant(pair.a_name, (0, 12 * MIB)), b.grant(pair.a_name, (12 * MIB, 100))]
    first = b.arena.array[0]
    stream = Stream(a, pair.b_name, grants[0].ticket, 12 * MIB)
    until(lambda: b.arena.array[0] != first, 2.0)
    if b.channel.quiesce(pair.a_name, within(3.0)) is not Status.OK:
        raise Wrong("quiesce of a peer that goes on was not OK")
    b.arena.fill(rig.seed)
    mine = b.arena.array.copy()
    stream.must_end()
    time.sleep(QUIET_S)
    for grant in grants:
        if a.move(pair.b_name, grant, [(0, 64, 0, 0)]) != [Status.REJECTED]:
            raise Wrong("after quiesce a grant that the peer held still works")
        if b.revoke(grant) is not Status.OK:
            raise Wrong("revoke after quiesce was not OK")
    told = b.arena.changed(mine)
    if told or a.lost or b.lost:
        raise Wrong(f"after quiesce: {told or '`lost` was told'}")
    for mover, owner, to, back in ((a, b, pair.b_name, pair.a_name),
                                   (b, a, pair.a_name, pair.b_name)):  # fmt: skip
        again = owner.grant(back, (0, 100))
        mover.must_move(to, again, 200, 100, 0, 0)


@check("T17", fix="close wakes every thread and ends every socket; remember the process that "
       "opened it")  # fmt: skip
def close_ends_all(rig: ChannelRig) -> None:
    """close takes at most its limit, also with transfers in flight, twice is as once, the peer is
    told; afterwards, and in a forked process, every method raises BackendClosed."""
    pair = rig.pair(LARGE)
    a, b = pair.a, pair.b
    grant = b.grant(pair.a_name, (0, LARGE))
    mine = a.grant(pair.b_name, (0, 64))
    told = _in_a_fork(lambda: _must_be_closed(a, pair.b_name, mine, b"\0"))
    if told:
        raise Wrong(f"in a forked process {told}")
    a.must_move(pair.b_name, grant, 0, 64, 0, 0)
    started = [a.start(pair.b_name, grant, [(0, LARGE, 0, 0)], seconds=60) for _ in range(4)]
    seconds = rig.close(a)
    again_s = rig.close(a)
    if seconds > CLOSE_LIMIT_S + CLOSE_SLACK_S or again_s > 1.0:
        raise Wrong(f"close took {seconds:.1f} s, and {again_s:.1f} s when called again")
    told = _must_be_closed(a, pair.b_name, mine, grant.ticket)
    for each in started:
        told = told or _ended(partial(a.channel.poll, each))
    if told:
        raise Wrong(f"after close {told}")
    if not until(lambda: b.lost, 3.0) or a.lost:
        raise Wrong("close is told as `lost` to the peer, and not to the side that closed")
    if b.revoke(grant) is not Status.OK:
        raise Wrong("revoke after the peer has closed was not OK")
    before = b.arena.array.copy()
    time.sleep(QUIET_S)
    if b.arena.changed(before):
        raise Wrong("a transfer of a peer that has closed went on after revoke")


def _must_be_closed(side: Side, peer: str, grant: Grant, ticket: bytes) -> str:
    """What does not raise BackendClosed; "" when all do."""
    channel, ctx = side.channel, within(1.0)
    piece = [Piece(side.arena.buffer(0, 8), 0)]
    calls: dict[str, Callable[[], object]] = {
        "register": lambda: channel.register(side.arena.region),
        "unregister": lambda: channel.unregister(side.arena.region),
        "metadata": channel.metadata,
        "connect": lambda: channel.connect(b"tcp://127.0.0.1:1", ctx),
        "disconnect": lambda: channel.disconnect(peer),
        "notify": lambda: channel.notify(peer, b"x"),
        "grant": lambda: channel.grant(peer, [piece[0].local], access=Access.READ, lease_s=1),
        "revoke": lambda: channel.revoke(grant, ctx),
        "write": lambda: channel.write(peer, ticket, piece, ctx),
        "read": lambda: channel.read(peer, ticket, piece, ctx),
        "poll": lambda: channel.poll(1),
        "cancel": lambda: channel.cancel(1),
        "quiesce": lambda: channel.quiesce(peer, ctx),
    }
    for name, call in calls.items():
        try:
            call()
        except BackendClosed:
            continue
        except Exception as error:
            return f"{name} raised {error!r}, due is BackendClosed"
        return f"{name} did not raise BackendClosed"
    return ""


def _ended(poll: Callable[[], object]) -> str:
    try:
        return "a transfer has no answers" if poll() is None else ""
    except BackendClosed:
        return ""


def _in_a_fork(work: Callable[[], str]) -> str:
    """What ``work`` says in a forked process."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        # A lock that another thread held can't be waited for here.
        signal.alarm(10)
        os.close(read_end)
        try:
            text = work()
        except BaseException as error:
            text = f"it raised {error!r}"
        os.write(write_end, text.encode()[:4000])
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        told = pipe.read().decode(errors="replace")
    _, code = os.waitpid(pid, 0)
    return told or ("a call did not return" if os.WIFSIGNALED(code) else "")
