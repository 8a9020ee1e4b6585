"""One controller: what it knows, what instances say to it, and what it does by itself."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from lmcache_core.agent import wire
from lmcache_core.controller.actions import Actions
from lmcache_core.controller.config import ControllerConfig
from lmcache_core.controller.directory import Directory
from lmcache_core.controller.documents import Documents, StoreDown
from lmcache_core.controller.jobs import Jobs
from lmcache_core.controller.meters import History
from lmcache_core.controller.names import Names, check_model
from lmcache_core.controller.pins import Pins
from lmcache_core.controller.problem import Refusal
from lmcache_core.controller.questions import Questions
from lmcache_core.controller.quotas import Quotas
from lmcache_core.controller.records import LeaseRecord
from lmcache_core.controller.registry import Record, Registry
from lmcache_core.controller.state import State
from lmcache_core.keys import TAG_BYTES
from lmcache_core.logs import EventLog

_CONTROLLER_TTL_S = 15.0


class Controller:
    """Belongs to one event loop, from `start` to `stop`.

    Args:
        now_s: monotonic; ``wall_s``: Unix time.

    Attributes:
        id: new in each process.
    """

    def __init__(
        self,
        config: ControllerConfig,
        state: State,
        *,
        now_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.id = "controller-" + secrets.token_hex(8)
        self.now_s, self.wall_s = now_s, wall_s
        self.started_s = now_s()
        clocks = {"now_s": now_s, "wall_s": wall_s}
        # Blocking calls of one SQLite file only wait for each other.
        self.documents = Documents(state, limit=8 if state.shared else 1, **clocks)
        self.directory = Directory(
            max_chunks=config.max_chunks, max_chunks_per_instance=config.max_chunks_per_instance
        )
        self.registry = Registry(config, self.directory, **clocks)
        self.names = Names(config, self.documents)
        self.jobs = Jobs(config, self.documents, woken=self._woken, **clocks)
        self.pins = Pins(config, self.documents, self.jobs, **clocks)
        self.quotas = Quotas(config, self.documents, self.names)
        self.questions = Questions(timeout_s=config.question_timeout_s, now_s=now_s)
        self.actions = Actions(self.documents, self.registry, self.names)
        self.history = History(config.sample_s)
        self.counts: Counter[str] = Counter()
        self.stopping = False
        self._log = EventLog(now_s)
        self._tasks: list[asyncio.Task[None]] = []
        self._leased_s = float("-inf")

    async def start(self) -> None:
        """Read what is kept, and begin to look after it.  A store that is away is no reason not to
        start."""
        try:
            await self.documents.refresh()
        except StoreDown:
            pass  # counted, logged and shown by health; the loop tries again
        loops = [(self._tick, self.config.tick_s), (self._sample, self.config.sample_s)]
        if self.documents.state.shared:
            loops.append((self.documents.refresh, self.config.refresh_s))
        self._tasks = [asyncio.create_task(self._every(*loop)) for loop in loops]

    def drain(self) -> None:
        """End every wait: what is asked from now on is answered at once."""
        self.stopping = True
        self.registry.wake_all()

    async def stop(self) -> None:
        """End it; what is kept stays in the state."""
        self.drain()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.documents.close()

    async def sync(self, sync: wire.Sync, *, gone: asyncio.Event | None = None) -> wire.Reply:
        """Take in what an instance says; the answer comes when it is owed something, at the latest
        after ``wait_s``.

        Args:
            gone: set when nobody waits for the answer any more.

        Raises:
            Refusal: it says what can't be; others are as they were.
        """
        if sync.version != wire.VERSION:
            raise Refusal(
                409,
                "version",
                f"the instance speaks version {sync.version}, the controller {wire.VERSION}",
                hint="update the older one",
            )
        self.counts["syncs"] += 1
        try:
            return await self._sync(sync, gone or asyncio.Event())
        except Refusal:
            self.counts["refused"] += 1
            raise

    def where(self, asked: wire.WhereRequest) -> wire.WhereReply:
        """Which instances' channels have chunks in their host tier, of those that are live.

        Raises:
            Refusal: no whole number of keys.
        """
        try:
            keys = wire.split(asked.keys)
        except ValueError as error:
            raise Refusal(422, "bad_keys", str(error)) from error
        peers: dict[int, str] = {
            record.slot: record.status.channel
            for record in self.registry.live()
            if record.name != asked.instance and record.status and record.status.channel
        }
        numbers = {slot: number for number, slot in enumerate(peers)}
        found = self.directory.holders(keys, peers, 0)
        # Another peer for other prefixes, so that not all ask the same one; the whole of one
        # prefix from as few as can be.
        turn = keys[0][TAG_BYTES] if keys else 0
        holder = tuple(numbers[slots[turn % len(slots)]] if slots else -1 for slots in found)
        return wire.WhereReply(peers=tuple(peers.values()), holder=holder)

    async def _sync(self, sync: wire.Sync, gone: asyncio.Event) -> wire.Reply:
        end_s = asyncio.get_running_loop().time() + sync.wait_s
        for model in sync.models:
            check_model(model)
        record = await self.registry.admit(sync)
        record.turn += 1
        turn = record.turn
        record.wake.set()  # an older sync of it, whose client left, need not wait
        async with record.lock:
            resync = await self.registry.hear(record, sync)
            await self.names.learn(sync.models, sync.namespaces)
            recorded, stop = await self.jobs.heard(record, sync.progress)
            recorded += await self.pins.heard(record, sync.progress)
            self.questions.answered(record, sync.answers)
            await self._lease(record)
        self.counts["resyncs"] += resync
        while True:
            record.wake.clear()
            reply = await self._reply(record, sync, resync, recorded, stop)
            left_s = end_s - asyncio.get_running_loop().time()
            over = left_s <= 0 or self.stopping or record.turn != turn or gone.is_set()
            if over or _says(reply):
                return reply
            if not await _either(record.wake, gone, left_s):
                end_s = 0.0

    async def _reply(
        self,
        record: Record,
        sync: wire.Sync,
        resync: bool,
        recorded: list[str],
        stop: list[str],
    ) -> wire.Reply:
        orders: list[wire.Order] = []
        cancel = list(stop)
        try:
            if record.status is not None and record.kind != "engine":
                orders, more = await self.jobs.due(record)
                cancel += more
                orders += await self.pins.due(record)
        except StoreDown:
            pass  # counted; they are owed still
        version, limits = self.quotas.limits(record)
        return wire.Reply(
            controller=self.id,
            resync=resync,
            orders=tuple(orders),
            cancel=tuple(dict.fromkeys(cancel)),
            recorded=tuple(recorded),
            questions=tuple(self.questions.due(record)),
            limits_version=version,
            limits=None if version == sync.limits_version else limits,
        )

    async def _lease(self, record: Record) -> None:
        """Tell all controllers that the instance lives."""
        lease_s = self.config.lease_s
        if self.now_s() - record.leased_s < lease_s / 3:
            return
        record.leased_s = self.now_s()
        lease = LeaseRecord(name=record.name, kind=record.kind, incarnation=record.incarnation)
        try:
            await self.documents.write("lease", record.name, lease, ttl_s=lease_s)
        except StoreDown:
            record.leased_s = float("-inf")

    async def _lost(self) -> set[str]:
        """Instances of live jobs that no controller has heard for the lease."""
        if self.now_s() - self.started_s < self.config.lease_s:
            return set()  # they may not have found us yet
        lost = set()
        for name in self.jobs.instances():
            record = self.registry.records.get(name)
            if record is not None and self.registry.is_live(record):
                continue
            if await self.documents.get_bytes("lease", name) is None:
                lost.add(name)
        return lost

    async def _tick(self) -> None:
        await self.registry.forget()
        self.documents.prune()
        await self.names.flush()
        if self.now_s() - self._leased_s >= _CONTROLLER_TTL_S / 3:
            lease = LeaseRecord(name=self.id)
            await self.documents.write("controller", self.id, lease, ttl_s=_CONTROLLER_TTL_S)
            self._leased_s = self.now_s()
        await self.pins.settle()
        await self.jobs.tick(await self._lost())

    async def _sample(self) -> None:
        self.history.sample(self.wall_s(), self.registry.totals)

    async def _every(self, step: Callable[[], Awaitable[None]], interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                await step()
            except StoreDown:
                pass  # counted and logged where it happened
            except Refusal as refusal:
                self._log.warn("controller_step", error=refusal)
            except Exception as error:  # a bug here must not end leases and deadlines for good
                self.counts["internal_error"] += 1
                self._log.warn("controller_bug", error=repr(error))

    def _woken(self, name: str) -> None:
        record = self.registry.records.get(name)
        if record is not None:
            record.wake.set()


def _says(reply: wire.Reply) -> bool:
    """Whether the instance should have it at once."""
    return bool(
        reply.resync
        or reply.orders
        or reply.cancel
        or reply.recorded
        or reply.questions
        or reply.limits is not None
    )


async def _either(one: asyncio.Event, other: asyncio.Event, timeout_s: float) -> bool:
    """Whether one of the two was set in time."""
    waits = [asyncio.create_task(event.wait()) for event in (one, other)]
    try:
        done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for task in waits:
            task.cancel()
