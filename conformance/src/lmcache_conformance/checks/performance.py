"""P: measured and shown, never a reason to fail."""

from __future__ import annotations

import statistics
import time

from lmcache_conformance.frame import Profile, check
from lmcache_conformance.harness import TcpHarness
from lmcache_conformance.memory import Memory, value
from lmcache_conformance.rig import Rig, within
from lmcache_core.sdk import Status


@check("P1", profile=Profile.REPORT, fix="move bytes straight between the buffer and the store")
def throughput(rig: Rig) -> None:
    """GB/s of put and get at 64 KiB, 1 MiB and 32 MiB, and their share of memcpy beside them."""
    store = rig.open(rig.harness.direct_url())
    for label, nbytes, turns in (
        ("64KiB", 64 << 10, 40),
        ("1MiB", 1 << 20, 20),
        ("32MiB", 32 << 20, 4),
    ):
        size = rig.size(nbytes)
        if size > rig.claims.max_value_bytes:
            continue
        source, target = Memory.of([value(1, size)]), Memory([size])
        key = rig.key(label)
        times: dict[str, list[float]] = {"put": [], "get": [], "memcpy": []}
        for _ in range(turns if not rig.full else 4 * turns):
            started_s = time.perf_counter()
            if store.put_from([key], source.buffers(read_only=True), within(30)) != [Status.OK]:
                break
            between_s = time.perf_counter()
            store.get_into([key], target.buffers(), within(30))
            ended_s = time.perf_counter()
            target.array[:] = source.array
            times["put"].append(between_s - started_s)
            times["get"].append(ended_s - between_s)
            times["memcpy"].append(time.perf_counter() - ended_s)
        if not times["put"]:
            continue
        middle = {name: statistics.median(found) for name, found in times.items()}
        for op in ("put", "get"):
            rig.figures[f"{op}_{label}_gb_s"] = round(size / middle[op] / 1e9, 3)
            rig.figures[f"{op}_{label}_of_memcpy"] = round(middle["memcpy"] / middle[op], 3)
            rig.figures[f"{op}_{label}_p50_ms"] = round(middle[op] * 1e3, 3)
            slow = sorted(times[op])[min(len(times[op]) - 1, int(0.99 * len(times[op])))]
            rig.figures[f"{op}_{label}_p99_ms"] = round(slow * 1e3, 3)
        store.delete([key], within(10))


@check("P2", profile=Profile.REPORT, fix="send a batch as one request")
def round_trips(rig: Rig) -> None:
    """Round trips that a batch of 32 keys takes, counted at the proxy."""
    if not isinstance(rig.harness, TcpHarness):
        return
    count = min(32, rig.claims.max_batch)
    keys, size = rig.keys(count), rig.size(4096)
    rig.must_put({key: value(i, size) for i, key in enumerate(keys)})
    memory = Memory([size] * count)
    for op in ("exists", "get_into", "put_from", "delete"):
        start = rig.proxy.turns
        if op in ("get_into", "put_from"):
            getattr(rig.store, op)(keys, memory.buffers(), within(10))
        else:
            getattr(rig.store, op)(keys, within(10))
        rig.figures[f"{op}_{count}_keys_round_trips"] = float(rig.proxy.turns - start)
