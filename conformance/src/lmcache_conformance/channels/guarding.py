"""T5 to T7: nobody touches what was not granted, or no longer is."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from lmcache_conformance.channels.recorder import Recorder, shaken
from lmcache_conformance.channels.rig import ChannelRig
from lmcache_conformance.channels.sides import MIB, Side, Stream, pattern, until, words
from lmcache_conformance.frame import Wrong, check
from lmcache_core.sdk import (
    Access,
    BackendUnavailable,
    ContractViolation,
    Grant,
    PeerRefused,
    Status,
)

QUIET_S = 0.25
"""So long nothing may be touched after a grant has ended."""


@check("T5", fix="look up the grant by its number and the peer that asks; check access, span and "
       "range before any byte")  # fmt: skip
def only_what_was_granted(rig: ChannelRig) -> None:
    """With the wrong access, another peer's ticket, or one that is garbage, cut or damaged, every
    piece is REJECTED, nothing is touched, and the channel goes on."""
    pair = rig.pair()
    a, b, other = pair.a, pair.b, rig.open()
    other_name = rig.join(other, b).a_name
    theirs = b.grant(other_name, (100_000, 5000))
    theirs_to_read = b.grant(other_name, (100_000, 5000), access=Access.READ)
    writable = b.grant(pair.a_name, (0, 5000))
    before = a.arena.array.copy(), b.arena.array.copy()

    def refused(what: str, ticket: bytes, reads: bool = False, size: int = 400) -> None:
        try:
            found = a.move(
                pair.b_name, ticket, [(9000, size, 0, 0)], reads=reads, notification=b"bad"
            )
        except ContractViolation:
            found = [Status.REJECTED]
        told = a.arena.changed(before[0]) or b.arena.changed(before[1])
        if found != [Status.REJECTED] or told:
            raise Wrong(f"{what}: {words(found)}; {told or 'nothing was changed'}")

    refused("a read with a grant to write", writable.ticket, reads=True)
    refused("a write with another peer's grant", theirs.ticket)
    refused("a read with another peer's grant", theirs_to_read.ticket, reads=True)
    a.must_move(pair.b_name, writable, 0, 400, 0, 0)
    b.revoke(writable)
    readable = b.grant(pair.a_name, (0, 5000), access=Access.READ)
    before = a.arena.array.copy(), b.arena.array.copy()
    refused("a write with a grant to read", readable.ticket)
    b.revoke(readable)
    # Damage may name a grant of somebody else; of this peer's own only the one below is open.
    small = b.grant(pair.a_name, (50_000, 100))
    for ticket in _damaged(rig, small.ticket):
        refused(f"a damaged ticket of {len(ticket)} bytes", ticket, size=101)
    b.revoke(small)
    refused("a grant that was revoked", small.ticket, size=50)
    again = b.grant(pair.a_name, (0, 5000))
    a.must_move(pair.b_name, again, 0, 400, 0, 0)
    if any(message == b"bad" for _, message in b.told):
        raise Wrong("a notification came though the piece was REJECTED")
    if a.lost or b.lost:
        raise Wrong("a bad ticket ended the connection")


def _damaged(rig: ChannelRig, ticket: bytes) -> list[bytes]:
    found = [b"", b"\0", b"garbage", bytes(len(ticket)), b"\xff" * len(ticket), ticket + b"\0",
             ticket * 2, rig.rng.bytes(32 << 10)]  # fmt: skip
    found += [ticket[:end] for end in range(0, len(ticket), max(1, len(ticket) // 16))]
    bits = len(ticket) * 8
    for bit in {int(each) for each in rig.rng.integers(0, bits, 200)}:
        changed = bytearray(ticket)
        changed[bit // 8] ^= 1 << (bit % 8)
        found.append(bytes(changed))
    return found


@check("T6", fix="after revoke has let nobody in, wait until whoever was inside has left")
def revoke_ends_everything(rig: ChannelRig) -> None:
    """Once revoke was OK nothing touches the spans, also not a transfer that was started before,
    writing or reading, in this process or another; a grant that ended, or was revoked, is OK."""
    pair = rig.pair(16 * MIB)
    a, b = pair.a, pair.b
    for turn in range(8 if rig.quick else 16):
        grant = b.grant(pair.a_name, (0, 12 * MIB))
        first = b.arena.array[0]
        stream = Stream(a, pair.b_name, grant.ticket, 12 * MIB)
        until(partial(_changed, b, int(first)), 2.0)
        time.sleep(float(rig.rng.uniform(0, 0.002)))
        _must_end(rig, b, grant, "a write that runs", stream.must_end)
        if turn == 0 and b.revoke(grant) is not Status.OK:
            raise Wrong("a grant that was revoked was not OK when it was revoked again")
    _reads_end(rig, a, b, pair.a_name, pair.b_name)
    _another_process_ends(rig)
    used = b.grant(pair.a_name, (0, 100))
    a.must_move(pair.b_name, used, 0, 100, 0, 0)
    if b.revoke(used) is not Status.OK or b.revoke(used) is not Status.OK:
        raise Wrong("revoke of a grant whose transfers had ended was not OK")
    if a.move(pair.b_name, used, [(0, 100, 0, 0)]) != [Status.REJECTED]:
        raise Wrong("a write with a grant that was revoked was not REJECTED")


def _changed(side: Side, first: int) -> bool:
    return int(side.arena.array[0]) != first


def _reads_end(rig: ChannelRig, a: Side, b: Side, a_name: str, b_name: str) -> None:
    """What is read OK was there before the revoke."""
    for _ in range(3):
        b.arena.array[:] = 1
        grant = b.grant(a_name, (0, 12 * MIB), access=Access.READ)
        started = a.start(b_name, grant, [(0, 12 * MIB, 0, 0)], reads=True)
        time.sleep(float(rig.rng.uniform(0, 0.004)))
        if b.revoke(grant) is not Status.OK:
            raise Wrong("revoke during a read was not OK, though the peer goes on")
        b.arena.array[:] = 2
        found = a.answers(started, 1)
        if found == [Status.OK] and (a.arena.array[: 12 * MIB] != 1).any():
            raise Wrong("a read was OK with bytes that were written after its grant was revoked")


def _another_process_ends(rig: ChannelRig) -> None:
    """The same with a writer that does not share our interpreter."""
    owner, peer = rig.open(16 * MIB), rig.peer(16 * MIB)
    name, there = rig.reached(owner, peer)
    for _ in range(3 if rig.quick else 10):
        peer.call("fill", seed=int(rig.rng.integers(1 << 30)))
        grant = owner.grant(name, (0, 12 * MIB))
        first = int(owner.arena.array[0])
        peer.call("stream", peer=there, ticket=grant.ticket.hex(), nbytes=12 * MIB, seconds=8.0)
        until(partial(_changed, owner, first), 2.0)
        time.sleep(float(rig.rng.uniform(0, 0.005)))
        _must_end(rig, owner, grant, "a write of another process", lambda: None)
    peer.close()


def _must_end(
    rig: ChannelRig, owner: Side, grant: Grant, what: str, stop: Callable[[], None]
) -> None:
    """Revoke, use the memory otherwise at once, and see that nobody else does."""
    # Made before, so that nothing that comes late is taken for ours.
    mine = pattern(int(rig.rng.integers(1 << 30)), len(owner.arena.array))
    status = owner.revoke(grant, 5.0)
    if status is not Status.OK:
        raise Wrong(f"revoke during {what} was {status.name}, though the peer goes on")
    owner.arena.array[:] = mine
    stop()
    time.sleep(QUIET_S)
    told = owner.arena.changed(mine)
    if told:
        raise Wrong(f"after revoke was OK, {what} went on: {told}")


@check("T7", fix="compare the lease's end with the clock at every access, also of a running one")
def a_lease_ends(rig: ChannelRig) -> None:
    """After its end a grant is REJECTED and nothing is touched; one that ends while it is used can
    be revoked, and nothing is touched after that."""
    pair = rig.pair(16 * MIB)
    a, b = pair.a, pair.b
    short = b.grant(pair.a_name, (0, 4096), lease_s=0.4)
    a.must_move(pair.b_name, short, 0, 100, 0, 0)
    readable = b.grant(pair.a_name, (0, 4096), access=Access.READ, lease_s=0.4)
    time.sleep(0.5)
    before = a.arena.array.copy(), b.arena.array.copy()
    for grant, reads in ((short, False), (readable, True)):
        found = a.move(pair.b_name, grant, [(5000, 100, 0, 0)], reads=reads, notification=b"late")
        told = a.arena.changed(before[0]) or b.arena.changed(before[1])
        if found != [Status.REJECTED] or told:
            raise Wrong(f"after the lease's end: {words(found)}; {told or 'nothing was changed'}")
        if b.revoke(grant) is not Status.OK:
            raise Wrong("revoke of a grant whose lease has ended was not OK")
    running = b.grant(pair.a_name, (0, 12 * MIB), lease_s=0.3)
    stream = Stream(a, pair.b_name, running.ticket, 12 * MIB)
    time.sleep(0.35)
    _must_end(rig, b, running, "a write over the lease's end", stream.must_end)
    if any(message == b"late" for _, message in b.told):
        raise Wrong("a notification came though the lease had ended")


@check("T19", fix="check again at the side that owns the memory, whatever the other has checked; a "
       "message that is none ends its connection")  # fmt: skip
def damaged_messages(rig: ChannelRig) -> None:
    """A byte changed in what follows the handshake makes nobody touch memory outside of the grant
    and of what is moved, or wait past its deadline; a new peer can connect afterwards."""
    a, b = rig.open(), rig.open()
    with Recorder(b.channel.metadata()) as wire:
        rig.introduce(a, a.connect(wire.metadata), b)
        good = shaken(wire.recordings[0])
    before = a.arena.array.copy(), b.arena.array.copy()
    for ours, start in ((True, len(good.sent)), (False, len(good.got))):
        for at in range(0, 80, 2 if rig.quick else 1):
            with Recorder(b.channel.metadata()) as wire:
                wire.flip = (ours, start + at)
                try:
                    _exchange(a, b, wire.metadata, b"damaged %d" % at)
                except (PeerRefused, BackendUnavailable):
                    continue  # a lane's handshake is longer than that of the first connection
            told = a.arena.changed(before[0], [(64, 4096)])
            told = told or b.arena.changed(before[1], [(64, 4096)])
            if told:
                raise Wrong(f"byte {at} behind the handshake was changed: {told}")
    pair = rig.join(a, b)
    again = b.grant(pair.a_name, (64, 4096))
    a.must_move(pair.b_name, again, 64, 4096, 0, 0)


def _exchange(a: Side, b: Side, metadata: bytes, message: bytes) -> None:
    """A write and a read through a proxy that changes a byte; any answer in time is fine."""
    b_name = a.connect(metadata)
    a.channel.notify(b_name, message)
    if until(lambda: any(found == message for _, found in list(b.told)), 0.05):
        a_name = b.has(message)
        grants = [b.grant(a_name, (64, 4096), access=access) for access in Access]
        for grant, reads in zip(grants, (True, False)):
            a.move(b_name, grant, [(64, 3000, 0, 500)], reads=reads, seconds=0.15)
        for grant in grants:
            if b.revoke(grant) is not Status.OK:
                raise Wrong("after a damaged message a grant could not be revoked")
    a.channel.disconnect(b_name)
