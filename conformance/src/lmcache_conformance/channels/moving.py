"""T1 to T4: what is moved arrives, and is told in order."""

from __future__ import annotations

import numpy as np

from lmcache_conformance.channels.rig import ChannelRig, Pair
from lmcache_conformance.channels.sides import MIB, Side, until, words
from lmcache_conformance.frame import NotClaimed, Wrong, check
from lmcache_core.sdk import Access, Status

PieceParts = tuple[int, int, int, int]


@check("T1", fix="loop until all bytes are moved; count offsets from the span's start, not from "
       "the region's")  # fmt: skip
def pieces_arrive(rig: ChannelRig) -> None:
    """Pieces of 1 byte to several MiB, at odd offsets and in several spans, written and read by
    either side of one connection, arrive exactly; no byte beside them is touched."""
    pair = rig.pair(8 * MIB)
    for mover, owner, to_owner, to_mover in _both_ways(pair):
        for reads in (False, True):
            for sizes in _size_lists(rig):
                _one_transfer(rig, mover, owner, (to_owner, to_mover), sizes, reads)


def _both_ways(pair: Pair) -> list[tuple[Side, Side, str, str]]:
    return [
        (pair.a, pair.b, pair.b_name, pair.a_name),
        (pair.b, pair.a, pair.a_name, pair.b_name),
    ]


def _size_lists(rig: ChannelRig) -> list[list[int]]:
    most = min(24, rig.claims().max_pieces)
    lists = [[1], [1, 2, 3], [4095, 4096, 4097], [65_535, 65_537], [3 * MIB + 1], [MIB, 1, MIB]]
    lists.append([7] * rig.claims().max_pieces)
    for _ in range(6 if rig.quick else 40):
        count = int(rig.rng.integers(1, most + 1))
        lists.append([int(each) for each in rig.rng.integers(1, 60_000, count)])
    return lists


def _one_transfer(
    rig: ChannelRig, mover: Side, owner: Side, names: tuple[str, str], sizes: list[int], reads: bool
) -> None:
    """Pieces of ``sizes`` to or from random places, the last one first."""
    to_owner, to_mover = names
    spans, pieces, local, at = [], [], 0, 0
    for number, size in enumerate(sizes):
        inside, gap = int(rig.rng.integers(0, 40)), int(rig.rng.integers(1, 90))
        # Spans are longer than what is moved, on both ends.
        spans.append((at + gap, inside + size + 3))
        pieces.append((local + gap, size, number, inside))
        at, local = at + gap + inside + size + 3, local + gap + size
    order = [int(each) for each in rig.rng.permutation(len(pieces))]
    access = Access.READ if reads else Access.WRITE
    grant = owner.grant(to_mover, *spans, access=access)
    before = owner.arena.array.copy(), mover.arena.array.copy()
    found = mover.move(to_owner, grant, [pieces[n] for n in order], reads=reads)
    if set(found) != {Status.OK}:
        raise Wrong(f"pieces of {sizes[:6]} bytes: {words(found[:8])}")
    for offset, size, span, inside in pieces:
        there = spans[span][0] + inside
        if mover.arena.bytes_at(offset, size) != owner.arena.bytes_at(there, size):
            raise Wrong(f"a piece of {size} bytes at {inside} arrived changed")
    ours = [] if not reads else [(offset, size) for offset, size, _, _ in pieces]
    theirs = [] if reads else [(spans[n][0] + inside, size) for _, size, n, inside in pieces]
    told = owner.arena.changed(before[0], theirs) or mover.arena.changed(before[1], ours)
    if told:
        raise Wrong(f"beside pieces of {sizes[:6]} bytes: {told}")
    source = before[0] if reads else before[1]
    for offset, size, span, inside in pieces:
        at = spans[span][0] + inside if reads else offset
        if not np.array_equal(source[at : at + size], mover.arena.array[offset : offset + size]):
            raise Wrong("what was moved is not what was there")
    if owner.revoke(grant) is not Status.OK:
        raise Wrong("revoke of a grant that nobody uses any more was not OK")
    mover.arena.fill(int(rig.rng.integers(1 << 30)))


@check("T2", fix="hand a notification over after the last byte is in place, on one thread a peer")
def notifications_come_once(rig: ChannelRig) -> None:
    """A transfer's notification comes once, when its bytes can be read there; those of notify come
    once and in their order, to either side."""
    pair = rig.pair(4 * MIB)
    a, b = pair.a, pair.b
    grant = b.grant(pair.a_name, (64, 2 * MIB))
    early: list[str] = []
    due: dict[bytes, bytes] = {}

    def watch(peer: str, message: bytes) -> None:
        if message in due and b.arena.bytes_at(64, 2 * MIB) != due[message]:
            early.append(message.decode())

    b.watch = watch
    sent = []
    for number in range(20):
        a.arena.fill(rig.seed + number)
        message = f"written {number}".encode()
        due[message] = a.arena.bytes_at(0, 2 * MIB)
        sent.append(message)
        if a.move(pair.b_name, grant, [(0, 2 * MIB, 0, 0)], notification=message) != [Status.OK]:
            raise Wrong("a write with a notification was not OK")
        b.has(message)
    if early:
        raise Wrong(f"the notification {early[0]!r} came before its bytes could be read")
    readable = b.grant(pair.a_name, (0, 100), access=Access.READ)
    a.move(pair.b_name, readable, [(0, 100, 0, 0)], reads=True, notification=b"read")
    sent.append(b"read")
    b.has(b"read")
    for side, peer in ((a, pair.b_name), (b, pair.a_name)):
        for number in range(200):
            if side.channel.notify(peer, b"%d" % number) is not Status.OK:
                raise Wrong("a small notification to a peer that listens was not OK")
    sent += [b"%d" % number for number in range(200)]
    for side in (a, b):
        side.has(b"199")
    until(lambda: len(b.told) > len(sent) + 1, 0.1)
    if [message for _, message in b.told if not message.startswith(b"introduction")] != sent:
        raise Wrong("notifications came twice, not at all, or in another order")
    if [message for _, message in a.told] != sent[-200:]:
        raise Wrong("notifications to the side that connected came in another order")
    if {peer for peer, _ in b.told} != {pair.a_name}:
        raise Wrong("one peer was told of under two names")


@check("T3", fix="one queue a peer, and no second transfer before the first has ended there")
def transfers_keep_their_order(rig: ChannelRig) -> None:
    """Where ``ordered`` is claimed, transfers to one peer take effect, and their notifications
    come, in the order in which they were started."""
    pair = rig.pair(8 * MIB)
    if not rig.claims().ordered:
        raise NotClaimed("ordered is not claimed")
    count = min(16, rig.claims().max_transfers)
    grant = pair.b.grant(pair.a_name, (0, 4 * MIB))
    for turn in range(3):
        pair.a.arena.fill(rig.seed + turn)
        # A large one first, so that a small one could overtake it.
        sizes = [4 * MIB if number % 4 == 0 else 64 for number in range(count)]
        started = [
            pair.a.start(
                pair.b_name, grant, [(number * 64, size, 0, 0)],
                notification=b"%d.%d" % (turn, number),
            )
            for number, size in enumerate(sizes)
        ]  # fmt: skip
        for each in started:
            if pair.a.answers(each, 1) != [Status.OK]:
                raise Wrong("one of several transfers at once was not OK")
        pair.b.has(b"%d.%d" % (turn, count - 1))
        if pair.b.arena.bytes_at(0, 64) != pair.a.arena.bytes_at((count - 1) * 64, 64):
            raise Wrong("the transfer that was started last is not the one that holds")
        told = [message for _, message in pair.b.told if message.startswith(b"%d." % turn)]
        if told != [b"%d.%d" % (turn, number) for number in range(count)]:
            raise Wrong(f"notifications of transfers came as {told}")


@check("T4", fix="decide each piece by itself; hand the notification over only when all are OK")
def one_bad_piece(rig: ChannelRig) -> None:
    """A piece outside of its span is REJECTED and touches nothing; the others are as they are, in
    order, and no notification comes."""
    pair = rig.pair()
    a, b = pair.a, pair.b
    for reads in (False, True):
        access = Access.READ if reads else Access.WRITE
        grant = b.grant(pair.a_name, (1000, 500), (9000, 500), access=access)
        bad = {"behind its end": (0, 401, 0, 100), "of a span that is none": (0, 10, 2, 0),
               "far away": (0, 10, 0, 1 << 40), "over its end": (0, 10, 1, 495),
               "before its start": (0, 10, 1, -5), "of no span": (0, 10, -1, 0)}  # fmt: skip
        for what, piece in bad.items():
            good: list[PieceParts] = [(2000, 200, 0, 0), (2500, 100, 1, 50), (3000, 30, 1, 400)]
            before = a.arena.array.copy(), b.arena.array.copy()
            found = a.move(
                pair.b_name, grant, [good[0], piece, *good[1:]],
                reads=reads, notification=b"not all",
            )  # fmt: skip
            if found != [Status.OK, Status.REJECTED, Status.OK, Status.OK]:
                raise Wrong(f"a piece {what}, second of four: {words(found)}")
            for offset, size, span, inside in good:
                there = (1000, 9000)[span] + inside
                if a.arena.bytes_at(offset, size) != b.arena.bytes_at(there, size):
                    raise Wrong(f"beside a piece {what}: one that is OK did not arrive")
            ours = [(offset, size) for offset, size, _, _ in good] if reads else []
            theirs = [] if reads else [((1000, 9000)[n] + at, size) for _, size, n, at in good]
            told = a.arena.changed(before[0], ours) or b.arena.changed(before[1], theirs)
            if told:
                raise Wrong(f"a piece {what} was REJECTED, and yet {told}")
            a.arena.fill(int(rig.rng.integers(1 << 30)))
    a.channel.notify(pair.b_name, b"after")
    b.has(b"after")
    if any(message == b"not all" for _, message in b.told):
        raise Wrong("a notification came though a piece was REJECTED")
