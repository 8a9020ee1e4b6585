"""Sessions against a model: one seed decides everything that several clients do."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from node_support import LAYOUT, SLOT_BYTES, keys_of

from lmcache_core.chunks import ChunkEngine
from lmcache_core.config import from_mapping
from lmcache_core.memory.arena import Arena
from lmcache_core.node import protocol
from lmcache_core.node.protocol import Decided, ProtocolError
from lmcache_core.node.session import Session

SLOTS, BOUND, LENGTH = 16, 6, 4
PREFIXES = [keys_of(f"prefix {number}", LENGTH) for number in range(6)]


class World:
    """Sessions of one engine, and what each must hold."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        config = from_mapping({"host_bytes": SLOTS * SLOT_BYTES})
        arena = Arena.create(SLOTS * SLOT_BYTES, prefault=False, warn=print)
        self.engine = ChunkEngine(config=config, arena=arena)
        self.sessions: dict[Session, tuple[dict[int, bytes], dict[int, list[int]]]] = {}
        self.committed: set[bytes] = set()
        self.number = 0

    def open(self) -> None:
        session = Session(
            str(self.number), self.engine, [LAYOUT], limit_bytes=BOUND * SLOT_BYTES, pid=1
        )
        self.sessions[session] = ({}, {})

    def step(self) -> None:
        self.number += 1
        if len(self.sessions) < 2:
            self.open()
        session = self.rng.choice(list(self.sessions))
        act = self.rng.choice(
            [self.open, self.reserve, self.reserve, self.commit, self.commit, self.abort,
             self.prefetch, self.prefetch, self.release, self.forget, self.end, self.wrong]
        )  # fmt: skip
        if act == self.open:
            if len(self.sessions) < 4:
                self.open()
        else:
            act(session)  # type: ignore[call-arg]
        self.check()

    def reserve(self, session: Session) -> None:
        keys = self.rng.choice(PREFIXES)
        answer = session.reserve(
            protocol.Reserve(self.number, (protocol.Run(b"".join(keys), None, 0, False),))
        )
        lent = {offset for slots, _ in self.sessions.values() for offset in slots}
        for key, offset in zip(keys, protocol.unpack_offsets(answer.answers)):
            if offset not in protocol.NO_SLOT.values():
                assert offset not in lent, "a slot is lent once"
                self.sessions[session][0][offset] = key

    def some(self, session: Session) -> list[int]:
        slots = self.sessions[session][0]
        return self.rng.sample(list(slots), self.rng.randint(0, len(slots)))

    def commit(self, session: Session) -> None:
        chosen = self.some(session)
        session.commit(protocol.Commit(protocol.pack_offsets(chosen)))
        for offset in chosen:
            self.committed.add(self.sessions[session][0].pop(offset))

    def abort(self, session: Session) -> None:
        chosen = self.some(session)
        session.abort(protocol.Abort(protocol.pack_offsets(chosen)))
        for offset in chosen:
            del self.sessions[session][0][offset]

    def prefetch(self, session: Session) -> None:
        keys = self.rng.choice(PREFIXES)
        answer = session.prefetch(protocol.Prefetch(self.number, 0, b"".join(keys), None, 1.0))
        assert isinstance(answer, Decided), "there is nothing to wait for"
        offsets = list(protocol.unpack_offsets(answer.offsets))
        assert self.committed.issuperset(keys[: len(offsets)]), "only what was committed"
        self.sessions[session][1][self.number] = offsets

    def release(self, session: Session) -> None:
        tickets = self.sessions[session][1]
        if tickets:
            number = self.rng.choice(list(tickets))
            session.release(protocol.Release(number))
            if self.rng.random() < 0.5:
                session.tidy()
            del tickets[number]

    def forget(self, session: Session) -> None:
        keys = self.rng.choice(PREFIXES)[self.rng.randrange(LENGTH) :]
        session.forget(protocol.Forget(b"".join(keys)))

    def end(self, session: Session) -> None:
        slots, tickets = self.sessions.pop(session)
        assert session.end() == (len(slots), len(tickets))

    def wrong(self, session: Session) -> None:
        """What belongs to another session, or to nobody, is refused and changes nothing."""
        own, tickets = self.sessions[session]
        others = [offset for slots, _ in self.sessions.values() for offset in slots]
        foreign = [offset for offset in [*others, 12345] if offset not in own]
        chosen = [*self.some(session), self.rng.choice(foreign)]
        with pytest.raises(ProtocolError):
            session.commit(protocol.Commit(protocol.pack_offsets(chosen)))
        with pytest.raises(ProtocolError):
            session.release(protocol.Release(max(tickets, default=0) + 1))

    def check(self) -> None:
        host = self.engine.host
        pinned: Counter[int] = Counter()
        for session, (slots, tickets) in self.sessions.items():
            session.tidy()
            held = len(slots) + sum(map(len, tickets.values()))
            assert session.held_bytes == held * SLOT_BYTES <= BOUND * SLOT_BYTES
            assert (session.slots, session.tickets) == (len(slots), len(tickets))
            for offsets in tickets.values():
                pinned.update(offsets)
        lent = {offset for slots, _ in self.sessions.values() for offset in slots}
        assert not lent & set(pinned), "nothing is written and read at the same time"
        chunks = [host.get(key) for key in host.keys()]  # noqa: SIM118
        found = [chunk for chunk in chunks if chunk is not None]
        for chunk in found:
            assert chunk.pins == pinned[chunk.offset]
        kept = {chunk.offset for chunk in found} | lent | set(pinned)
        assert host.used_bytes == len(kept) * SLOT_BYTES, "every byte is accounted for"


@pytest.mark.parametrize("seed", range(20))
def test_sessions_hold_what_they_were_given_and_no_more(seed: int) -> None:
    world = World(seed)
    for _ in range(300):
        world.step()
    for session in list(world.sessions):
        world.end(session)
    world.check()
    assert world.committed
    world.engine.close()
