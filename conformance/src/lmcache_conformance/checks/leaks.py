"""L: nothing grows."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmcache_conformance.checks.faults import behind_a_proxy
from lmcache_conformance.frame import Profile, check
from lmcache_conformance.harness import TcpHarness
from lmcache_conformance.memory import Memory, value
from lmcache_conformance.proxy import FaultProxy
from lmcache_conformance.rig import Rig, within
from lmcache_core.sdk import BackendUnavailable, LMCacheError

_SETTLE_S = 3.0


@dataclass(frozen=True, slots=True)
class Held:
    """What this process holds."""

    files: int
    threads: int
    shared: int
    rss_bytes: int


def held(proxy: FaultProxy | None = None) -> Held:
    """Now; without what ``proxy``, which runs in this process, holds for its connections."""
    gc.collect()
    proxied = proxy.connections if proxy is not None else 0
    statm = Path("/proc/self/statm").read_text().split()
    maps = Path("/proc/self/maps").read_text()
    return Held(
        files=len(os.listdir("/proc/self/fd")) - 2 * proxied,
        threads=threading.active_count() - 2 * proxied,
        shared=maps.count("/dev/shm/") + maps.count("/memfd:"),
        rss_bytes=int(statm[1]) * os.sysconf("SC_PAGE_SIZE"),
    )


def settled(before: Held | None = None, proxy: FaultProxy | None = None) -> Held:
    """`held`, once it stops shrinking: what ends a moment after a call is no leak."""
    end_s = time.monotonic() + _SETTLE_S
    found = held(proxy)
    while time.monotonic() < end_s:
        if before and found.files <= before.files and found.threads <= before.threads:
            return found
        time.sleep(0.05 if before else 0.2)
        again = held(proxy)
        if not before and again == found:
            return found
        found = again
    return found


def _expect_flat(rig: Rig, cycle: Callable[[int], None], what: str) -> None:
    """Files, threads and shared memory are the same after many cycles; resident memory too."""
    count = 1000 if rig.full else 120
    # How many connections a client keeps is its own business; L3 bounds them.
    proxy = rig.harness.proxy if isinstance(rig.harness, TcpHarness) else None
    for number in range(20):
        cycle(number)
    before = settled(proxy=proxy)
    for number in range(count):
        cycle(number)
    after = settled(before, proxy)
    rig.expect(after.files <= before.files, f"{after.files - before.files} files more after {what}")
    rig.expect(
        after.threads <= before.threads,
        f"{after.threads - before.threads} threads more after {what}",
    )
    rig.expect(
        after.shared <= before.shared,
        f"{after.shared - before.shared} shared maps more after {what}",
    )
    grown = after.rss_bytes - before.rss_bytes
    rig.expect(
        grown < max(8 << 20, count * (16 << 10)), f"{grown >> 20} MiB more after {count} {what}"
    )


@check("L1", profile=Profile.RESILIENT, limit_s=300, fix="release per call what a call takes")
def cycles_leak_nothing(rig: Rig) -> None:
    """Puts, gets and deletes, over and over, leave files, threads, shared memory and resident
    memory as they were."""
    keys, size = rig.keys(4), rig.size(128 << 10)
    source, target = Memory.of([value(1, size)]), Memory([size])

    def cycle(number: int) -> None:
        key = keys[number % 4]
        rig.store.put_from([key], source.buffers(read_only=True), within(10))
        rig.store.get_into([key], target.buffers(), within(10))
        rig.store.delete([key], within(10))

    _expect_flat(rig, cycle, "cycles")


@check(
    "L2",
    profile=Profile.RESILIENT,
    limit_s=300,
    fix="release in `finally`: a failed call returns too",
)
def failed_calls_leak_nothing(rig: Rig) -> None:
    """Calls that miss, mismatch, are too late or break the contract leave nothing behind."""
    key, size = rig.key("k"), rig.size(64 << 10)
    rig.must_put({key: value(1, size)})
    small, target = Memory([rig.claims.alignment]), Memory([size])
    over = [key] * (min(rig.claims.max_batch, 4096) + 1)

    def cycle(number: int) -> None:
        rig.store.get_into([rig.key("none")], target.buffers(), within(10))
        rig.store.get_into([key], small.buffers(), within(10))
        rig.store.get_into([key], target.buffers(), within(-1))
        rig.store.get_into([key], target.buffers(), within(0.0002))
        with contextlib.suppress(LMCacheError):
            rig.store.exists(over, within(10))
        # A late call may have closed its connection; the next one has it again.
        rig.store.get_into([key], target.buffers(), within(10))

    _expect_flat(rig, cycle, "failed calls")


@check(
    "L3", profile=Profile.RESILIENT, limit_s=300, fix="close the socket of a connection that failed"
)
def broken_connections_leak_nothing(rig: Rig) -> None:
    """Calls over connections that break or are refused leave nothing behind; connections at the
    store stay within max_concurrency, and end with the connector."""
    behind_a_proxy(rig)
    key, size = rig.key("k"), rig.size(64 << 10)
    store = rig.open()
    rig.must_put({key: value(1, size)}, store)
    target = Memory([size])

    def cycle(number: int) -> None:
        rig.proxy.faults.refuse = number % 2 == 0
        rig.proxy.hang_up()
        with contextlib.suppress(BackendUnavailable):
            store.get_into([key], target.buffers(), within(1))

    _expect_flat_without_proxy(rig, cycle)
    rig.proxy.faults.refuse = False
    rig.until_well(store)
    most = rig.claims.max_concurrency + 2
    rig.expect(
        rig.proxy.connections <= most, f"{rig.proxy.connections} connections, {most} are plenty"
    )
    rig.store.close()
    store.close()
    end_s = time.monotonic() + _SETTLE_S
    while rig.proxy.connections and time.monotonic() < end_s:
        time.sleep(0.05)
    rig.expect(not rig.proxy.connections, f"{rig.proxy.connections} connections stay after close()")


def _expect_flat_without_proxy(rig: Rig, cycle: Callable[[int], None]) -> None:
    """Files only, and with slack for what the proxy holds in this process."""
    for number in range(20):
        cycle(number)
    rig.proxy.hang_up()
    before = settled()
    count = 300 if rig.full else 60
    for number in range(count):
        cycle(number)
    rig.proxy.hang_up()
    after = settled(before)
    grown = after.files - before.files
    rig.expect(grown < count // 6, f"{grown} files more after {count} broken connections")
