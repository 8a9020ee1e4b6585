"""Any `RemoteConnector` as a tier: what it holds, its quota, and the envelope of every chunk.

Owner-thread methods queue jobs on the tier's executor and return at once; answers come
back through the runtime's completions.  A job touches only its own chunks' slots, which
the owner keeps (WRITING or pinned) until the job has settled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from lmcache_core.config import TierConfig
from lmcache_core.logs import EventLog
from lmcache_core.metrics import Metrics
from lmcache_core.policy.codec_choice import Way
from lmcache_core.policy.shares import Taken
from lmcache_core.sdk import (
    OnExisting,
    OpContext,
    RemoteConnector,
    ScanEntry,
    Sharing,
    Status,
    SupportsScan,
    Unsupported,
)
from lmcache_core.tiers.calls import Calls
from lmcache_core.tiers.encoding import Encoding
from lmcache_core.tiers.gets import Asked, Fetched, Gets
from lmcache_core.tiers.host import HostChunk, HostTier
from lmcache_core.tiers.puts import MAX_BATCH, Puts
from lmcache_core.tiers.quota import Quota
from lmcache_core.tiers.removals import Ended, Removals
from lmcache_core.tiers.work import Parts
from lmcache_core.transfer.executor import Runtime


class RemoteTier:
    """One tier below host.  Owner thread only, except inside its own jobs.

    Args:
        name: in metrics and hit reports.
        connector: open; the tier closes it.
        host: whose slots are read and written.
        encoding: of the chunks on the store.

    Attributes:
        on_change: told each key that was stored here, and each that was deleted.
        on_lost: told a slot that native code may still touch.
        on_evict: told keys that are deleted to make room, and by which policy.
        removals: its deletes.
    """

    def __init__(
        self,
        name: str,
        connector: RemoteConnector,
        *,
        config: TierConfig,
        host: HostTier,
        runtime: Runtime,
        metrics: Metrics,
        encoding: Encoding,
    ) -> None:
        self.name = name
        self.config = config
        self.connector = connector
        self._host = host
        self._runtime = runtime
        self._metrics = metrics
        log = EventLog(runtime.now_s)
        self._calls = Calls(
            name, connector, config=config, runtime=runtime, count=self.count, log=log
        )
        self._encoding = encoding
        self.on_change: Callable[[bytes, bool], None] = lambda key, present: None
        self.on_lost: Callable[[HostChunk], None] = lambda slot: None
        self.on_evict: Callable[[Sequence[bytes], str], None] = lambda keys, policy: None
        self._quota = Quota(
            config.size_bytes, runtime.now_s, gone=lambda key: self.on_change(key, False)
        )
        self._max_batch = max(1, min(connector.capabilities.max_batch, MAX_BATCH))
        self.removals = Removals(
            connector,
            self._calls,
            self._quota,
            max_batch=self._max_batch,
            after=self._after_deletes,
        )
        parts = Parts(
            tier=self,
            host=host,
            runtime=runtime,
            calls=self._calls,
            quota=self._quota,
            encoding=encoding,
            log=log,
        )
        self._gets, self._puts = Gets(parts), Puts(parts)

    def count(self, event: str, amount: int = 1) -> None:
        """Count ``event`` under this tier's name."""
        self._metrics.counter(f"{self.name}.{event}").inc(amount)

    @property
    def available(self) -> bool:
        """Whether requests may use the tier now."""
        return self._calls.allowed and self._host.lost_bytes <= self.config.max_lost_bytes

    @property
    def unavailable_reason(self) -> str:
        """Why the breaker is open; "" while closed."""
        return self._calls.refusal

    @property
    def settling(self) -> bool:
        """Whether answers are still to come in time."""
        return self.available and self._calls.in_time

    @property
    def used_bytes(self) -> int:
        """Bytes that are or may be on the store, as far as we know."""
        return self._quota.used_bytes

    @property
    def max_batch(self) -> int:
        """Most keys in one call."""
        return self._max_batch

    @property
    def shared(self) -> bool:
        """Whether other processes store there too."""
        return self.connector.capabilities.sharing is not Sharing.PROCESS

    @property
    def pinned_bytes(self) -> int:
        """Of chunks here that eviction leaves alone."""
        return self._quota.pinned_bytes

    def shares(self, most: int) -> list[Taken]:
        """What the largest namespaces take, at most ``most`` of them."""
        return self._quota.shares.largest(most)

    def stored_size(self, key: bytes) -> int:
        """Bytes that ``key`` takes on the store, as far as we know; 0 when it is not there."""
        return self._quota.size(key)

    def recover(self) -> None:
        """Learn what an earlier process left, with its sizes; blocks; called at open."""
        if not isinstance(self.connector, SupportsScan) or not self.connector.capabilities.scan:
            return
        if not self.config.size_bytes and self.connector.capabilities.sharing is Sharing.CLUSTER:
            # Its own server bounds it, and what it holds may be millions of others' chunks.
            return
        ctx = OpContext(deadline_s=self._runtime.now_s() + 60.0)
        entries: list[ScanEntry] = sorted(
            self.connector.scan(b"", ctx), key=lambda entry: entry.used_at_s
        )
        epoch_s, now_s = time.time(), self._runtime.now_s()
        for entry in entries:
            used_at_s = now_s - max(0.0, epoch_s - entry.used_at_s)
            self._quota.found(entry.key, entry.nbytes, used_at_s)
        self.make_room(0)

    def holds(self, key: bytes) -> bool:
        """Whether ``key`` is stored here to stay, or on its way here, as far as we know."""
        stays = key in self._quota and not self._quota.is_leaving(key)
        return (stays and self._gets.is_readable(key)) or key in self._puts

    def has(self, key: bytes) -> bool:
        """Whether ``key`` is stored here, confirmed and to stay, as far as we know."""
        return self._quota.is_resident(key) and self._gets.is_readable(key)

    def is_putting(self, key: bytes) -> bool:
        """Whether a put of ``key`` is under way, or waits."""
        return self._quota.is_writing(key) or key in self._puts

    def exists(self, keys: Sequence[bytes], done: Asked) -> None:
        """Ask for ``keys`` in batches; what the store lacked a moment ago is not asked again."""
        self._gets.exists(keys, done)

    def fetch(
        self,
        chunk: HostChunk,
        done: Fetched,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Fill the WRITING ``chunk``; OK only when its envelope was verified and it is decoded.

        ``done`` comes, with the reason where we know more than the status, when nobody but the
        owner can touch the slot any more, or with ABANDONED, in which case the slot is to be
        lost; with None when nothing was tried, since ``wanted``, asked in the worker's thread,
        had turned False.
        """
        self._gets.fetch(chunk, done, wanted)

    def store(self, chunk: HostChunk, done: Callable[[Status], None]) -> None:
        """Queue a write of the pinned, SEALED ``chunk`` until `start_stores`; ``done`` when its
        slot is the owner's again.

        Where the quota is full the put waits until older chunks are confirmed deleted, so
        the tier never holds more than ``size_bytes``.  Where the chunk itself is being deleted,
        such as one that was corrupt, it waits for that.
        """
        if not self.available:
            self.count("dropped_breaker")
            done(Status.FAILED)
        elif self.holds(chunk.key):
            # A second copy beside the first, even for a moment, would not be counted.
            done(Status.OK)
        else:
            self._puts.add(chunk, done)

    def way(self, codec: str, level: str) -> Way:
        """What `rewrite` takes.

        Raises:
            ConfigError: no such codec, or level.
            Unsupported: what is stored here can't be rewritten.
        """
        if self.config.write == "never":
            raise Unsupported(f"tier {self.name} is only read", hint="set write: through")
        if self.connector.capabilities.on_existing is not OnExisting.REPLACE:
            raise Unsupported(
                f"the store of tier {self.name} keeps the first value of a key",
                hint="set the tier's codec, and store the chunks anew",
            )
        return self._encoding.way(codec, level)

    def rewrite(self, chunk: HostChunk, way: Way, done: Callable[[Status], None]) -> None:
        """Replace the stored bytes of ``chunk``, fetched from here, by another encoding of it.

        The store has it all the while, in one form or the other.  MISS when it was deleted, or
        is being, since it was fetched.
        """
        if self._quota.is_leaving(chunk.key) or chunk.stamp != self._quota.stamp(chunk.key):
            done(Status.MISS)
            return
        self._puts.add(chunk, done, way)
        self._puts.start()

    def start_stores(self) -> None:
        """Start the queued puts that fit; have older chunks deleted for the others."""
        self._puts.start()

    def delete(self, keys: Sequence[bytes], ended: Ended = lambda kept: None) -> None:
        """Remove ``keys`` in the background; their room is free once that is confirmed.

        A key that is being put goes when that has ended.  ``ended`` is told, once, which are still
        there.
        """
        self.removals.remove(keys, ended)

    def take_back(self, meant: Callable[[bytes], bool]) -> int:
        """Have no put start that waits; their number.  Each is told MISS."""
        return self._puts.take_back(meant)

    def pin(self, key: bytes) -> None:
        """Never evict ``key``, until as many `unpin`; it need not be here."""
        self._quota.pin(key)

    def unpin(self, key: bytes) -> None:
        """End one `pin`."""
        self._quota.unpin(key)

    def limit_shares(self, limits: Mapping[bytes, int]) -> None:
        """Hold each namespace to so many bytes, by tag, and no others: what goes over it lasts
        until its oldest chunks are deleted."""
        self._quota.limit_shares(limits)

    def resident(self) -> list[bytes]:
        """Keys that are here for sure, as far as we know."""
        return self._quota.resident()

    def keys_of(self, tag: bytes, *, unused_for_s: float = 0.0) -> list[bytes]:
        """Known keys of one namespace tag, b"" for all, that were not used for so long."""
        return self._quota.keys_of(tag, self._runtime.now_s() - unused_for_s)

    def tick(self) -> None:
        """Notice overdue calls, and namespaces over their share; called in every poll."""
        self._calls.tick()
        if self._quota.shares.over:
            victims = self._quota.choose_over_share(self._max_batch)
            if victims:
                self.count("evicted", len(victims))
                self.on_evict(victims, "quota")
                self.delete(victims)

    def close(self, timeout_s: float) -> bool:
        """Close executor and connector, each within its limit; False when a call still runs."""
        return self._calls.close(timeout_s)

    def stored(self, key: bytes) -> None:
        """A put of ``key`` has succeeded."""
        self._gets.stored(key)
        self.on_change(key, True)

    def make_room(self, nbytes: int) -> None:
        """Have the oldest chunks deleted, until so many bytes more will fit."""
        victims = self._quota.choose_victims(nbytes)
        if victims:
            self.count("evicted", len(victims))
            self.on_evict(victims, "lru")
            self.delete(victims)

    def put_ended(self, keys: Sequence[bytes], doubtful: Sequence[bytes]) -> None:
        """Puts of ``keys`` have ended; ``doubtful`` may be there or not."""
        # The room stays taken until their delete is confirmed.
        self.delete(doubtful)
        self.removals.put_ended(keys)

    def _after_deletes(self, all_gone: bool) -> None:
        if not all_gone:
            self._puts.drop_first()
        self._puts.start()
