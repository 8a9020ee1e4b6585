"""A one-sided channel of one thread, on which everything may go wrong, decided by one seed.

Like one over RDMA it can't stop what runs: a writer that gave up, or whose connection broke, may
still write for a while, and what it writes then is not what it was asked to.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lmcache_core.sdk import (
    Access,
    BackendUnavailable,
    Buffer,
    ChannelCapabilities,
    ChannelHost,
    Grant,
    OpContext,
    Piece,
    Region,
    Status,
    TransferChannel,
)

Touched = Callable[[Buffer], None]


@dataclass(eq=False)
class Granted:
    peer: str
    spans: tuple[Buffer, ...]
    until_s: float
    revoked: bool = False
    writers: int = 0
    abandoned: bool = False


@dataclass(eq=False)
class Going:
    """A write on its way; ``done`` bytes are there."""

    number: int
    source: Buffer
    grant: Granted
    owner: SimChannel
    to: str
    notification: bytes
    deadline_s: float
    copy: bytes
    done: int = 0
    answer: Status | None = None
    ghost: bool = False


class SimNet:
    """Every channel, and what is on its way between them."""

    def __init__(self, rng: random.Random, now_s: Callable[[], float]) -> None:
        self.rng = rng
        self.now_s = now_s
        self.channels: dict[str, SimChannel] = {}
        self.mail: dict[tuple[str, str], list[Callable[[], None]]] = {}
        self.going: list[Going] = []
        self.trouble = 0.0

    def step(self) -> bool:
        """Let one thing happen; False when nothing is on its way."""
        moves: list[Callable[[], None]] = [
            lambda queue=queue: queue.pop(0)() for queue in self.mail.values() if queue
        ]
        moves += [lambda one=one: self._move(one) for one in self.going]
        if not moves:
            return False
        self.rng.choice(moves)()
        return True

    def drain(self) -> None:
        while self.step():
            pass

    def post(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        self.mail.setdefault((source, target), []).append(deliver)

    def break_link(self, one: SimChannel, other: SimChannel) -> None:
        """Both lose each other; what runs goes on as a ghost."""
        if other.name not in one.peers:
            return
        for channel, lost in ((one, other), (other, one)):
            channel.peers.discard(lost.name)
            self.mail.pop((channel.name, lost.name), None)
        for going in self.going:
            if {going.to, going.grant.peer} == {one.name, other.name}:
                self.leave(going, Status.FAILED)
        for channel, lost in ((one, other), (other, one)):
            channel.host.lost(lost.name, "the link broke")

    def leave(self, going: Going, status: Status) -> None:
        """Its caller wants it no more, and it goes on with other bytes."""
        if going.answer is None:
            going.answer = Status.ABANDONED if going.done or self.rng.random() < 0.5 else status
            if going.answer is Status.ABANDONED:
                going.ghost = True
            else:
                self._end(going)

    def _move(self, going: Going) -> None:
        target = going.grant.spans[0]
        if not going.ghost and self.rng.random() < self.trouble / 8:
            going.ghost = True
            going.answer = Status.ABANDONED
        if not going.ghost and self.now_s() >= going.deadline_s:
            self.leave(going, Status.TIMED_OUT)
            return
        size = len(going.copy)
        part = min(size - going.done, self.rng.randint(1, size))
        self.channels[going.to].touched(target)
        assert target.view is not None and going.source.view is not None
        start, end = going.done, going.done + part
        data = bytes(self.rng.randbytes(part)) if going.ghost else going.source.view[start:end]
        target.view[start:end] = data
        going.done = end
        if going.done < size:
            return
        if going.ghost:
            self._end(going)
            going.owner.host.released(going.source.token)
            return
        going.answer = Status.OK
        self._end(going)
        message, owner, to = going.notification, going.owner.name, going.to
        if to in going.owner.peers:
            # Before its caller knows, or long after.
            self.post(owner, to, lambda: self.channels[to].told(owner, message))

    def _end(self, going: Going) -> None:
        self.going.remove(going)
        grant = going.grant
        grant.writers -= 1
        if grant.abandoned and not grant.writers:
            grant.abandoned = False
            for span in grant.spans:
                self.channels[going.to].host.released(span.token)


class SimChannel(TransferChannel):
    """Peers are known by the address of their channel."""

    capabilities = ChannelCapabilities(one_sided=True)

    def __init__(self, net: SimNet, name: str, host: ChannelHost, touched: Touched) -> None:
        self.net = net
        self.name = name
        self.host = host
        self.touched = touched
        self.peers: set[str] = set()
        self._grants: dict[int, Granted] = {}
        self._transfers: dict[int, Going] = {}
        self._ready: dict[int, list[Status]] = {}
        net.channels[name] = self

    def register(self, region: Region) -> None: ...

    def unregister(self, region: Region) -> None: ...

    def metadata(self) -> bytes:
        return self.name.encode()

    def connect(self, metadata: bytes, ctx: OpContext) -> str:
        name = metadata.decode()
        if self.net.rng.random() < self.net.trouble / 4:
            raise BackendUnavailable("nobody answers")
        self.peers.add(name)
        self.net.channels[name].peers.add(self.name)
        return name

    def disconnect(self, peer: str) -> None:
        if peer in self.peers:
            self.net.break_link(self, self.net.channels[peer])

    def notify(self, peer: str, message: bytes) -> Status:
        if peer not in self.peers:
            return Status.FAILED
        if self.net.rng.random() < self.net.trouble / 16:
            return Status.REJECTED
        self.net.post(self.name, peer, lambda: self.net.channels[peer].told(self.name, message))
        return Status.OK

    def told(self, peer: str, message: bytes) -> None:
        if peer in self.peers:
            self.host.notified(peer, message)

    def grant(self, peer: str, spans: Sequence[Buffer], *, access: Access, lease_s: float) -> Grant:
        if peer not in self.peers:
            raise BackendUnavailable("the peer is gone")
        number = len(self._grants) + 1
        self._grants[number] = Granted(peer, tuple(spans), self.net.now_s() + lease_s)
        return Grant(number, number.to_bytes(8, "little"))

    def revoke(self, grant: Grant, ctx: OpContext) -> Status:
        one = self._grants[grant.number]
        one.revoked = True
        for _ in range(self.net.rng.randint(0, 6)):
            if one.writers:
                self.net.step()
        if not one.writers:
            return Status.OK
        one.abandoned = True
        return Status.ABANDONED

    def write(
        self,
        peer: str,
        grant: bytes,
        pieces: Sequence[Piece],
        ctx: OpContext,
        *,
        notification: bytes = b"",
    ) -> int:
        number = len(self._transfers) + len(self._ready) + 1
        while number in self._transfers or number in self._ready:
            number += 1
        found = None
        if peer in self.peers:
            found = self.net.channels[peer]._grants.get(int.from_bytes(grant, "little"))
        if found is None:
            self._ready[number] = [Status.FAILED]
            return number
        refused = found.revoked or found.peer != self.name or self.net.now_s() >= found.until_s
        if refused or self.net.rng.random() < self.net.trouble / 8:
            self._ready[number] = [Status.REJECTED]
            return number
        assert len(pieces) == 1 and pieces[0].local.view is not None
        going = Going(
            number, pieces[0].local, found, self, peer, notification, ctx.deadline_s,
            bytes(pieces[0].local.view),
        )  # fmt: skip
        found.writers += 1
        self._transfers[number] = going
        self.net.going.append(going)
        return number

    def read(self, *args: object, **kwargs: object) -> int:
        raise NotImplementedError

    def poll(self, transfer: int) -> list[Status] | None:
        if transfer in self._ready:
            return self._ready.pop(transfer)
        going = self._transfers[transfer]
        if going.answer is None:
            return None
        del self._transfers[transfer]
        return [going.answer]

    def wait(self, transfer: int, timeout_s: float) -> list[Status] | None:
        self.net.step()
        return self.poll(transfer)

    def cancel(self, transfer: int) -> None:
        going = self._transfers.get(transfer)
        if going is not None:
            self.net.leave(going, Status.TIMED_OUT)

    def quiesce(self, peer: str, ctx: OpContext) -> Status:
        return Status.OK

    def close(self) -> None:
        for name in list(self.peers):
            self.disconnect(name)


@dataclass
class SimChannels:
    """What a hub opens its channel with."""

    net: SimNet
    name: str
    touched: Touched
    made: list[SimChannel] = field(default_factory=list)

    def open(self, url: str, host: ChannelHost) -> SimChannel:
        self.made.append(SimChannel(self.net, self.name, host, self.touched))
        return self.made[0]
