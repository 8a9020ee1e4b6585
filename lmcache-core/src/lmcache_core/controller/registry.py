"""Which instances there are, and what they said last.  Soft: a restart forgets all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from lmcache_core.agent import wire
from lmcache_core.controller.config import ControllerConfig
from lmcache_core.controller.directory import Directory, TooManyChunks
from lmcache_core.controller.meters import Meter, Totals
from lmcache_core.controller.problem import Refusal, not_found
from lmcache_core.keys import STORED_KEY_BYTES

_MIN_SYNC_S = 0.5
_MAX_MODELS = 64
_SYNCS = 2
"""An older process has been silent for so many syncs before a newer one gets its name."""


@dataclass(slots=True, kw_only=True, eq=False)
class Record:
    """One instance.  Of one event loop.

    Attributes:
        slot: in the directory.
        seen_s: monotonic, when its last sync came; ``seen_wall_s`` is Unix time.
        gap_s: what it lets pass between two syncs, as observed.
        next_seq: number of the change that is to come.
        synced: all that it holds is known; else ``loading``: a snapshot is coming in pieces.
        refused: why what it holds is not known; "" else.
        wake: set when it is owed something.
        lock: one sync at a time.
        turn: counts syncs; one that waits ends when the next one comes.
        tags: of namespaces that it has used, the latest last.
        told: order or question -> when it was told of it (monotonic).
        limits: that hold for its ``tags``, as `Quotas` worked them out; None when these changed.
    """

    name: str
    incarnation: str
    kind: wire.Kind
    slot: int
    seen_s: float
    seen_wall_s: float
    gap_s: float = _MIN_SYNC_S
    next_seq: int = 0
    synced: bool = False
    loading: bool = False
    refused: str = ""
    status: wire.Status | None = None
    models: dict[bytes, wire.Model] = field(default_factory=dict)
    tags: dict[bytes, None] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    turn: int = 0
    told: dict[str, float] = field(default_factory=dict)
    leased_s: float = float("-inf")
    limits: tuple[int, str, tuple[wire.Limit, ...]] | None = None

    @property
    def tiers(self) -> tuple[wire.TierStatus, ...]:
        """Host first; () until it said."""
        return self.status.tiers if self.status is not None else ()

    def tier_number(self, name: str) -> int | None:
        """Of the tier named; None when it has none."""
        return next((n for n, tier in enumerate(self.tiers) if tier.name == name), None)


class Registry:
    """Instances by name, and the chunks that they hold."""

    def __init__(
        self,
        config: ControllerConfig,
        directory: Directory,
        *,
        now_s: Callable[[], float],
        wall_s: Callable[[], float],
    ) -> None:
        self.directory = directory
        self.records: dict[str, Record] = {}
        self.totals = Totals()
        self._by_slot: dict[int, Record] = {}
        self._config = config
        self._now_s, self._wall_s = now_s, wall_s

    async def admit(self, sync: wire.Sync) -> Record:
        """The record of who speaks, made or taken over when it may be.

        Raises:
            Refusal: another process has the name, or there are too many instances.
        """
        record = self.records.get(sync.instance)
        if record is None:
            if len(self.records) >= self._config.max_instances:
                raise Refusal(
                    409,
                    "too_many_instances",
                    f"there are {len(self.records)} instances already",
                    hint="raise --max-instances, or wait until lost ones are forgotten",
                )
            return self._join(sync)
        now_s = self._now_s()
        if record.incarnation == sync.incarnation:
            if record.kind != sync.kind:
                raise Refusal(400, "bad_sync", "an instance can't change its kind")
            passed_s = min(now_s - record.seen_s, self._config.lease_s)
            record.gap_s = max(_MIN_SYNC_S, passed_s, sync.wait_s)
        else:
            silent_s = now_s - record.seen_s
            if silent_s <= _SYNCS * record.gap_s:
                raise Refusal(
                    409,
                    "name_taken",
                    f"another process says that it is instance {sync.instance!r}",
                    hint="give each instance a name of its own (setting: instance)",
                )
            del self.records[record.name]
            successor = self._join(sync)
            record.turn += 1
            record.wake.set()
            async with record.lock:
                await self._leave(record)
            return successor
        record.seen_s, record.seen_wall_s = now_s, self._wall_s()
        return record

    async def hear(self, record: Record, sync: wire.Sync) -> bool:
        """Take in what an instance holds and how it is; its lock must be held.

        Returns:
            Whether it must say all that it holds again.

        Raises:
            Refusal: what it says can't be, or is too much.
        """
        _check(record, sync)
        if sync.reset:
            record.models, record.tags = {}, {}
        record.models.update((model.tag, model) for model in sync.models)
        if len(record.models) > _MAX_MODELS:
            raise Refusal(413, "too_many_models", f"more than {_MAX_MODELS} models of an instance")
        if sync.namespaces or sync.reset:
            record.limits = None
        for note in sync.namespaces:
            record.tags.pop(note.tag, None)
            record.tags[note.tag] = None
        while len(record.tags) > self._config.max_namespaces_per_instance:
            del record.tags[next(iter(record.tags))]
        if sync.status is not None:
            self._status(record, sync.status)
        return not await self._changes(record, sync)

    def live(self) -> list[Record]:
        """Instances that have spoken within the lease, by name."""
        return [record for _, record in sorted(self.records.items()) if self.is_live(record)]

    def is_live(self, record: Record) -> bool:
        """Whether it has spoken within the lease."""
        return self._now_s() - record.seen_s <= self._config.lease_s

    def state(self, record: Record) -> Literal["live", "lost", "resyncing"]:
        """As the API has it."""
        if not self.is_live(record):
            return "lost"
        return "live" if record.synced or record.kind == "engine" else "resyncing"

    def named(self, name: str) -> Record:
        """The instance.

        Raises:
            Refusal: there is none.
        """
        record = self.records.get(name)
        if record is None:
            raise not_found("instance", name, hint="GET /v1/instances lists them")
        return record

    def at(self, slot: int) -> Record | None:
        """Who has a slot of the directory."""
        return self._by_slot.get(slot)

    def node_of(self, record: Record) -> Record | None:
        """The node server of an engine, when it is known here."""
        wanted = record.status.node if record.status is not None else ""
        if not wanted:
            return None
        return next((r for r in self.records.values() if r.incarnation == wanted), None)

    async def forget(self) -> None:
        """Forget those that have been silent for ``forget_s``."""
        for record in list(self.records.values()):
            if self._now_s() - record.seen_s > self._config.forget_s and not record.lock.locked():
                del self.records[record.name]
                async with record.lock:
                    await self._leave(record)

    def wake_all(self) -> None:
        """End every wait."""
        for record in self.records.values():
            record.wake.set()

    def _join(self, sync: wire.Sync) -> Record:
        record = Record(
            name=sync.instance,
            incarnation=sync.incarnation,
            kind=sync.kind,
            slot=self.directory.join(),
            seen_s=self._now_s(),
            seen_wall_s=self._wall_s(),
            gap_s=max(_MIN_SYNC_S, sync.wait_s),
        )
        self.records[record.name] = self._by_slot[record.slot] = record
        return record

    async def _leave(self, record: Record) -> None:
        # First: nobody may find a half forgotten instance through its slot.
        self._by_slot.pop(record.slot, None)
        await self.directory.leave(record.slot)

    def _status(self, record: Record, status: wire.Status) -> None:
        record.status = status
        below = [tier.name for tier in status.tiers[1:]]
        totals = Totals.of(status.counters, below)
        self.totals = self.totals.plus(record.meter.feed(self._now_s(), totals))

    async def _changes(self, record: Record, sync: wire.Sync) -> bool:
        """Whether nothing is missing after them."""
        if sync.reset:
            record.synced, record.loading = False, True
            record.next_seq = sync.seq
            await self.directory.clear(record.slot)
        elif not record.synced and not record.loading:
            return False
        skip = record.next_seq - sync.seq
        if skip < 0:
            record.synced = record.loading = False
            return False
        # Those that it told before, and whose answer was lost, come again.
        new = sync.changes[skip:]
        try:
            for change in new:
                keys = wire.split(change.keys)
                if change.present:
                    await self.directory.add(record.slot, change.tier, keys)
                else:
                    await self.directory.remove(record.slot, change.tier, keys)
        except TooManyChunks as error:
            record.synced = record.loading = False
            record.refused = f"instance {record.name!r} is not in the directory: {error}"
            await self.directory.clear(record.slot)
            raise Refusal(
                413,
                "too_many_chunks",
                record.refused,
                hint="raise --max-chunks-per-instance or --max-chunks",
            ) from error
        record.next_seq += len(new)
        if record.loading and not sync.more:
            record.loading, record.synced = False, True
            record.refused = ""
        return True


def _check(record: Record, sync: wire.Sync) -> None:
    """Refuse what can't be, before anything is taken in."""
    tiers = len(sync.status.tiers) if sync.status is not None else len(record.tiers)
    for change in sync.changes:
        if len(change.keys) % STORED_KEY_BYTES:
            raise Refusal(400, "bad_sync", "a change has no whole number of keys")
        if change.tier >= tiers:
            raise Refusal(400, "bad_sync", f"a change of tier {change.tier}, of {tiers} tiers")
    if sync.kind == "engine" and sync.changes:
        raise Refusal(400, "bad_sync", "an engine of a node server holds no chunks")
    if sync.status is not None:
        names = [tier.name for tier in sync.status.tiers]
        if len(set(names)) != len(names):
            raise Refusal(400, "bad_sync", "two tiers with one name")
