"""Transfers of ``nixl+ucx://`` on their way, and the thread that sees to them.

The library's release of a running transfer does not stop it: UCX forgets the request, and may go on
touching memory.  So a handle is kept until its transfer has ended, whatever its caller was told.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lmcache_backend_nixl.channel_wire import NOTIFY, POKE, QUIET, REVOKED, Identity, pack_number
from lmcache_backend_nixl.ucx import Rows, State, UcxAgent
from lmcache_core.sdk import ContractViolation, Link, ReleaseToken, Status

IDLE_TICK_S = 0.25
"""How often an idle channel looks after what is left."""
ACTIVE_S = 0.05
"""How long a POKE keeps a channel at work."""
POKE_EVERY_S = 0.02
SPIN_S = 0.002
PAUSE_S = 0.0002
MAX_PAUSE_S = 0.001


@dataclass(slots=True, eq=False)
class Peer:
    """The other side of one link; guarded by the agent's lock.

    Attributes:
        offset_s: what to add to our clock to have theirs, rather too much than too little.
        loaded, theirs_loaded: sequence of the last META that we, they have loaded.
        running: transfers in the library, also those that were left behind, and those that wait.
        gone: no transfer and no notification any more; said or left.
        quiet: nothing of it runs any more, and nothing will: it said so, or is dead.
        ended: there is no link any more.
    """

    name: str
    link: Link
    identity: Identity
    nonce: bytes
    deadline_s: float
    theirs: bytes = b""
    doormat: int = 0
    meta_sent_s: float = 0.0
    offset_s: float = 0.0
    loaded: int = -1
    theirs_loaded: int = -1
    greeting: int | None = None
    greeted: bool = False
    they_greeted: bool = False
    running: int = 0
    poked_s: float = 0.0
    gone: bool = False
    quiet: bool = False
    said_quiet: bool = False
    ended: bool = False
    revoked: dict[int, float] = field(default_factory=dict)
    revoking: set[int] = field(default_factory=set)

    @property
    def ready(self) -> bool:
        """Whether both sides have loaded and read from each other."""
        return self.greeted and self.they_greeted and self.theirs_loaded >= 0


@dataclass(slots=True, eq=False)
class Transfer:
    """One write or read; guarded by the agent's lock.

    Attributes:
        grant, sequence: of the ticket.
        moved: which pieces go through the library; the others are decided.
        tokens: of their ``local``, for when they are left behind.
        statuses: of all pieces, with those of ``moved`` still open.
        whole: no piece is refused, so ``notification`` goes out when all are there.
        answers: once there are some.
    """

    peer: Peer
    grant: int
    sequence: int
    op: str
    kinds: tuple[int, int]
    rows: tuple[Rows, Rows]
    moved: Sequence[int]
    tokens: Sequence[ReleaseToken]
    statuses: list[Status]
    whole: bool
    deadline_s: float
    notification: bytes
    handle: int | None = None
    posted: bool = False
    answers: list[Status] | None = None

    def answer(self, status: Status) -> None:
        """Give ``status`` to all that is open."""
        for at in self.moved:
            self.statuses[at] = status
        self.answers = self.statuses


class Transfers:
    """All transfers of one channel, and its thread.

    Args:
        released: `ChannelHost.released`.
        late: counts transfers that were left behind.
        tick: called by the thread, at most every `IDLE_TICK_S`; returns whether it wants to be
            called again at once, because somebody is connecting.
        failed: told of an error of ours or of a callback; the thread goes on.
    """

    def __init__(
        self,
        agent: UcxAgent,
        *,
        clock: Callable[[], float],
        released: Callable[[ReleaseToken], None],
        late: Callable[[], None],
        tick: Callable[[], bool],
        failed: Callable[[Exception], None],
        max_transfers: int,
    ) -> None:
        self._agent = agent
        self._clock = clock
        self._released = released
        self._late = late
        self._tick = tick
        self._failed = failed
        self._max_transfers = max_transfers
        self._numbers = itertools.count(1)
        self._known: dict[int, Transfer] = {}
        self._refused: dict[int, list[Status]] = {}
        self._live: dict[Transfer, None] = {}
        self._freed: list[ReleaseToken] = []
        self._active_until_s = 0.0
        self._wanted = threading.Event()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="nixl-ucx", daemon=True)
        self._thread.start()

    def start(self, transfer: Transfer) -> int:
        """Post it, or have it wait for registrations that it needs.  Returns its number."""
        number = next(self._numbers)
        peer = transfer.peer
        with self._agent.lock:
            self._known[number] = transfer
            if not transfer.moved:
                self._finish(transfer, Status.OK)
            elif peer.gone:
                transfer.answer(Status.FAILED)
            elif transfer.deadline_s <= self._clock():
                transfer.answer(Status.TIMED_OUT)
            elif peer.running >= self._max_transfers or transfer.grant in peer.revoked:
                transfer.answer(Status.REJECTED)
            else:
                peer.running += 1
                self._live[transfer] = None
                self._advance(transfer)
        if transfer.answers is None:
            self._wanted.set()
        self.hand_back()
        return number

    def refuse(self, status: Status, count: int) -> int:
        """The number of a transfer of which every piece is answered ``status``."""
        number = next(self._numbers)
        self._refused[number] = [status] * count
        return number

    def poll(self, number: int) -> list[Status] | None:
        """See `TransferChannel.poll`."""
        refused = self._refused.pop(number, None)
        if refused is not None:
            return refused
        transfer = self._known.get(number)
        if transfer is None:
            raise ContractViolation(f"no transfer {number}", backend="nixl+ucx", op="poll")
        # The thread, or somebody who posts, has it: what is new is seen at the next call.
        if transfer.answers is None and self._agent.lock.acquire(blocking=False):
            try:
                if transfer in self._live:
                    self._agent.progress()
                    self._advance(transfer)
            finally:
                self._agent.lock.release()
            self.hand_back()
        if transfer.answers is None:
            return None
        del self._known[number]
        return transfer.answers

    def cancel(self, number: int) -> None:
        """Leave it behind; unknown ones are fine."""
        with self._agent.lock:
            transfer = self._known.get(number)
            if transfer is not None and transfer in self._live:
                self._leave(transfer, Status.TIMED_OUT)

    def leave_all(self, peer: Peer, early: Status) -> None:
        """Answer every transfer to ``peer``: ``early``, or ABANDONED where it runs."""
        with self._agent.lock:
            for transfer in [one for one in self._live if one.peer is peer]:
                self._advance(transfer)
                self._leave(transfer, early)
        self.hand_back()

    def revoke(self, peer: Peer, grant: int, until_s: float) -> None:
        """The owner wants ``grant`` back; it is told once none of its transfers runs."""
        with self._agent.lock:
            now_s = self._clock()
            peer.revoked = {n: s for n, s in peer.revoked.items() if s > now_s}
            peer.revoked[grant] = until_s
            peer.revoking.add(grant)
            for transfer in [one for one in self._live if one.peer is peer]:
                if transfer.grant == grant and not transfer.posted:
                    self._finish(transfer, Status.REJECTED)
            self._settle(peer)
        self._wanted.set()

    def say_quiet(self, peer: Peer) -> None:
        """Tell the peer, which is ``gone``, once nothing of ours runs there."""
        with self._agent.lock:
            self._settle(peer)

    def wake(self, active: bool = False) -> None:
        """Have the thread look now; ``active``: and stay at work, since a peer needs it."""
        if active:
            self._active_until_s = self._clock() + ACTIVE_S
        self._wanted.set()

    def stop(self, timeout_s: float) -> None:
        """End the thread."""
        self._open = False
        self._wanted.set()
        self._thread.join(timeout_s)

    def give_up(self) -> list[ReleaseToken]:
        """Release every handle, for the agent ends now; the tokens of what may be running."""
        with self._agent.lock:
            tokens = [token for one in self._live if one.posted for token in one.tokens]
            for transfer in list(self._live):
                self._leave(transfer, Status.FAILED)
                if transfer.handle is not None:
                    self._agent.release(transfer.handle)
                    transfer.handle = None
            self._live.clear()
            return tokens

    def hand_back(self) -> None:
        """Tell core of buffers whose late transfers have ended; without the lock."""
        while self._freed:
            try:
                token = self._freed.pop()
            except IndexError:
                return
            self._released(token)

    def _run(self) -> None:
        ticked_s = began_s = self._clock()
        greeting = True
        pause_s = 0.0
        while self._open:
            now_s = self._clock()
            wanted = self._wanted.is_set()
            if wanted:
                self._wanted.clear()
                began_s, pause_s = now_s, 0.0
            try:
                if greeting or wanted or now_s - ticked_s >= IDLE_TICK_S:
                    ticked_s = now_s
                    greeting = self._tick()
                self._step()
                self.hand_back()
            except Exception as error:
                self._failed(error)
            if self._live or greeting or self._clock() < self._active_until_s:
                if now_s - began_s > SPIN_S:
                    pause_s = min(pause_s + PAUSE_S / 10, MAX_PAUSE_S)
                time.sleep(pause_s)
            else:
                self._wanted.wait(IDLE_TICK_S)

    def _step(self) -> None:
        self._agent.progress()
        for transfer in list(self._live):
            with self._agent.lock:
                if transfer in self._live:
                    self._advance(transfer)

    def _advance(self, transfer: Transfer) -> None:
        """Post it, see whether it has ended, or leave it behind at its deadline."""
        peer = transfer.peer
        state = State.RUNNING
        if transfer.posted:
            if transfer.handle is not None:
                state = self._agent.state(transfer.handle)
        elif peer.loaded >= transfer.sequence and not peer.gone:
            transfer.posted = True
            transfer.handle, state = self._agent.start(
                transfer.op, transfer.kinds, transfer.rows, peer.identity.agent
            )
        if state is not State.RUNNING:
            self._finish(transfer, Status.OK if state is State.DONE else Status.FAILED)
            return
        if transfer.posted:
            self._poke(peer)
        if transfer.answers is None and self._clock() >= transfer.deadline_s:
            self._leave(transfer, Status.TIMED_OUT)

    def _poke(self, peer: Peer) -> None:
        """Where the transport needs the peer's processor, have it look."""
        now_s = self._clock()
        if now_s - peer.poked_s >= POKE_EVERY_S and not peer.ended:
            peer.poked_s = now_s
            peer.link.send(POKE, b"")

    def _leave(self, transfer: Transfer, early: Status) -> None:
        if transfer.posted:
            if transfer.answers is None:
                self._late()
                transfer.answer(Status.ABANDONED)
        else:
            self._finish(transfer, early)

    def _finish(self, transfer: Transfer, status: Status) -> None:
        """The library has ended with it, or never had it."""
        peer = transfer.peer
        if transfer.handle is not None:
            self._agent.release(transfer.handle)
            transfer.handle = None
        if transfer in self._live:
            del self._live[transfer]
            peer.running -= 1
        if transfer.answers is not None:
            self._freed += transfer.tokens
        else:
            if status is Status.OK and transfer.whole and transfer.notification:
                sent = Status.FAILED
                if not peer.gone:
                    sent = peer.link.send(NOTIFY, transfer.notification)
                # The bytes are there, and nobody was told.
                status = status if sent is Status.OK else Status.FAILED
            transfer.answer(status)
        self._settle(peer)

    def _settle(self, peer: Peer) -> None:
        """Answer what waits for the end of transfers to ``peer``."""
        if peer.revoking:
            busy = {one.grant for one in self._live if one.peer is peer}
            for grant in [one for one in peer.revoking if one not in busy]:
                if peer.link.send(REVOKED, pack_number(grant)) is not Status.REJECTED:
                    peer.revoking.discard(grant)
        if peer.gone and not peer.running and not peer.said_quiet:
            peer.said_quiet = peer.link.send(QUIET, b"") is not Status.REJECTED
