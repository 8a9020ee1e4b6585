"""T8 and T9: a peer that is killed, and one that stands still."""

from __future__ import annotations

import time
from typing import NamedTuple

from lmcache_conformance.channels.guarding import QUIET_S
from lmcache_conformance.channels.peer import Peer
from lmcache_conformance.channels.rig import CLOSE_SLACK_S, ChannelRig
from lmcache_conformance.channels.sides import MIB, SLACK_S, Side, pattern, until, words
from lmcache_conformance.frame import Wrong, check
from lmcache_core.sdk import CLOSE_LIMIT_S, Access, Buffer, Grant, Status

LARGE = 24 * MIB
"""More than what sockets hold, so that a peer that stands still holds a transfer up."""


class _Open(NamedTuple):
    """A grant, its span, and of what the peer has filled its memory with."""

    grant: Grant
    span: Buffer
    seed: int


def _incoming(rig: ChannelRig, side: Side, peer: Peer, name: str, there: str) -> _Open:
    """Let the peer write into a new grant; returns once bytes come."""
    span = side.arena.buffer(0, LARGE)
    grant = side.channel.grant(name, [span], access=Access.WRITE, lease_s=60)
    side.arena.array[:64] = 0
    side.arena.array[LARGE - 64 : LARGE] = 0
    first = side.arena.bytes_at(0, 64)
    seed = int(rig.rng.integers(1 << 30))
    peer.call("fill", seed=seed)
    peer.call("stream", peer=there, ticket=grant.ticket.hex(), nbytes=LARGE, seconds=8.0)
    if not until(lambda: side.arena.bytes_at(0, 64) != first, 5.0):
        raise Wrong("a peer's write into a grant has not begun within 5 s")
    return _Open(grant, span, seed)


def _freeze_inside(side: Side, peer: Peer, opened: _Open) -> None:
    """Freeze the peer in the middle of a write, not between two, where that can be had."""
    first, last = (int(each) for each in pattern(opened.seed, LARGE + MIB)[[0, LARGE - 1]])
    for number in range(30):
        peer.freeze()
        # What is on its way still comes.
        time.sleep(0.05)
        memory = side.arena.array
        # Every pass adds one to each byte.
        if (int(memory[0]) - first) % 256 != (int(memory[LARGE - 1]) - last) % 256:
            return
        peer.thaw()
        time.sleep(0.001 * number)


def _must_stop(
    rig: ChannelRig, side: Side, opened: _Open, what: str, *, ok: bool, deadline_s: float = 1.5
) -> Status:
    """Revoke in time; after OK the memory is ours."""
    started_s = time.monotonic()
    status = side.revoke(opened.grant, deadline_s)
    seconds = time.monotonic() - started_s
    if seconds > deadline_s + SLACK_S:
        raise Wrong(f"revoke with {deadline_s} s, {what}, took {seconds:.1f} s")
    if status is not Status.OK and (ok or status is not Status.ABANDONED):
        raise Wrong(f"revoke, {what}, was {status.name}")
    if status is Status.OK:
        side.arena.fill(int(rig.rng.integers(1 << 30)))
    return status


@check("T8", fix="a connection that ends: answer its transfers, tell `lost` once, let grants be "
       "revoked")  # fmt: skip
def a_killed_peer(rig: ChannelRig) -> None:
    """A peer that is killed while it is written to, or writes: transfers answer by their deadline,
    `lost` is told once, grants can be revoked and their memory stays as it is, and a new peer can
    connect."""
    side = rig.open(LARGE + MIB)
    for meet in (rig.reach, rig.reached):
        peer = rig.peer(LARGE + MIB)
        name, there = meet(side, peer)
        ticket = peer.grant(there, 0, LARGE)
        peer.freeze()
        started = side.start(name, ticket, [(0, LARGE, 0, 0)], seconds=5.0)
        time.sleep(0.1)
        peer.kill()
        found = side.answers(started, 1, 5.0)
        if found[0] is Status.OK and not rig.claims().one_sided:
            raise Wrong("a write to a peer that stood still, and was killed, was OK")
        _must_be_lost(side, name)

    peer = rig.peer(LARGE + MIB)
    name, there = rig.reached(side, peer)
    opened = _incoming(rig, side, peer, name, there)
    peer.kill()
    status = _must_stop(rig, side, opened, "its peer was killed", ok=False, deadline_s=2.0)
    if status is Status.ABANDONED:
        _must_release(side, opened, "its peer was killed")
        side.arena.fill(7)
    mine = side.arena.array.copy()
    _must_be_lost(side, name)
    if side.arena.changed(mine):
        raise Wrong("the memory of a grant was touched after its peer was killed, and it revoked")

    fresh = rig.peer()
    name, there = rig.reach(side, fresh)
    ticket = fresh.grant(there, 0, 1000)
    side.must_move(name, ticket, 0, 1000, 0, 0)


def _must_be_lost(side: Side, name: str) -> None:
    def count() -> int:
        return sum(peer == name for peer, _ in list(side.lost))

    if not until(count, 5.0):
        raise Wrong("a peer was killed, and `lost` was not told within 5 s")
    time.sleep(QUIET_S)
    if count() != 1:
        raise Wrong(f"a peer was killed, and `lost` was told {count()} times")
    if side.channel.notify(name, b"late") is not Status.FAILED:
        raise Wrong("a notification to a peer that is gone was not FAILED")


@check("T9", fix="no wait without the time that is left; the side that granted must be able to end "
       "a grant alone, or say ABANDONED")  # fmt: skip
def a_frozen_peer(rig: ChannelRig) -> None:
    """With a peer that stands still: transfers answer by their deadline, revoke is OK where
    ``can_revoke`` is claimed and else ABANDONED until `released`, close takes no longer than its
    limit; when it goes on, what was revoked stays untouched and transfers work again."""
    side = rig.open(LARGE + MIB)
    peer = rig.peer(LARGE + MIB)
    name, there = rig.reach(side, peer)
    writable, readable = peer.grant(there, 0, LARGE), peer.grant(there, 0, LARGE, "read")
    peer.freeze()
    for reads, ticket in ((False, writable), (True, readable)):
        started_s = time.monotonic()
        found = side.move(name, ticket, [(0, LARGE, 0, 0)], reads=reads, seconds=0.5)
        seconds = time.monotonic() - started_s
        if found[0] not in (Status.TIMED_OUT, Status.ABANDONED) and not (
            rig.claims().one_sided and found[0] is Status.OK
        ):
            raise Wrong(f"a {'read' if reads else 'write'} with a frozen peer: {words(found)}")
        if seconds > 0.5 + SLACK_S:
            raise Wrong(f"with a frozen peer a deadline of 0.5 s took {seconds:.1f} s")
    peer.thaw()
    again = peer.grant(there, 0, 1000)
    side.arena.fill(3)
    if not until(lambda: side.move(name, again, [(0, 1000, 0, 0)]) == [Status.OK], 5.0):
        raise Wrong("the peer goes on again, and writes to it are not OK within 5 s")

    opened = _incoming(rig, side, peer, name, there)
    _freeze_inside(side, peer, opened)
    status = _must_stop(rig, side, opened, "its peer frozen", ok=rig.claims().can_revoke)
    mine = side.arena.array.copy()
    peer.thaw()
    if status is Status.ABANDONED:
        _must_release(side, opened, "its peer goes on again")
        mine = side.arena.array.copy()
    time.sleep(2 * QUIET_S)
    if side.arena.changed(mine):
        raise Wrong("a peer that went on touched memory whose grant was revoked")

    last = rig.peer(LARGE + MIB)
    name, there = rig.reached(side, last)
    _incoming(rig, side, last, name, there)
    ticket = last.grant(there, 0, LARGE)
    last.freeze()
    side.start(name, ticket, [(0, LARGE, 0, 0)], seconds=60.0)
    seconds = rig.close(side)
    if seconds > CLOSE_LIMIT_S + CLOSE_SLACK_S:
        raise Wrong(f"close with a frozen peer took {seconds:.1f} s, allowed are {CLOSE_LIMIT_S}")


def _must_release(side: Side, opened: _Open, what: str) -> None:
    if not until(lambda: opened.span.token in side.released, 10.0):
        raise Wrong(f"a grant was ABANDONED, {what}, and its span is not released within 10 s")
    time.sleep(QUIET_S)
    if side.released.count(opened.span.token) != 1:
        raise Wrong("a span was released more than once")
