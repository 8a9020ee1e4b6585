"""InfiniStore over TCP: our connector beside the same library called bare, in one process.

    python benchmarks/backend_infinistore.py [--out build/bench.json] [--rounds 9]

A real server in a network namespace of its own, which this process enters: no relay is measured.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figure, interleave, save, show, throughput

from lmcache_backend_infinistore.server import InfinistoreServer
from lmcache_backend_infinistore.warden import SERVICE_PORT
from lmcache_conformance import Memory, within
from lmcache_conformance.rig import Host
from lmcache_core import plugins
from lmcache_core.sdk import RemoteConnector, Status

MIB = 1 << 20
SIZES = (("1MiB", MIB, 32), ("32MiB", 32 * MIB, 4))
TARGETS = {"put": 0.70, "get": 0.60}


def bare_client() -> Any:
    import infinistore

    config = infinistore.ClientConfig(
        host_addr="127.0.0.1",
        service_port=SERVICE_PORT,
        connection_type=infinistore.TYPE_TCP,
        log_level="error",
    )
    client = infinistore.InfinityConnection(config)
    client.connect()
    return client


def of_size(
    store: RemoteConnector, client: Any, other: Any, memory: Memory, label: str, nbytes: int,
    count: int, rounds: int,
) -> list[Figure]:  # fmt: skip
    keys = [f"{label}-{i}".encode() for i in range(count)]
    names = [f"bare-{label}-{i}" for i in range(count)]
    sources, targets = memory.buffers(read_only=True), memory.buffers()

    def ours_put() -> None:
        assert set(store.put_from(keys, sources, within(60))) == {Status.OK}

    def ours_get() -> None:
        results = store.get_into(keys, targets, within(60))
        assert {result.status for result in results} == {Status.OK}

    def bare_put() -> None:
        for name, source in zip(names, sources):
            client.tcp_write_cache(name, source.address, nbytes)

    def bare_get() -> None:
        for name in names:
            client.tcp_read_cache(name)
            if nbytes > MIB:
                # As ours does: else one in a thousand sends the server into an endless loop, which
                # is asked for the next value before it has put the last one away.
                other.check_exist(name)

    def empty() -> None:
        store.delete(keys, within(60))
        client.delete_keys([name for name in names if client.check_exist(name)])
        time.sleep(0.05)

    runs = {"put": {"ours": ours_put, "raw": bare_put}, "get": {"ours": ours_get, "raw": bare_get}}
    empty()
    times = {"put": interleave(runs["put"], rounds, empty)}
    empty()
    ours_put()
    bare_put()
    times["get"] = interleave(runs["get"], rounds)
    empty()
    return [
        throughput(
            f"infinistore.{op}_{label}", nbytes * count, times[op], TARGETS[op],
            f"{op} of {count} values out of or into a mapped region, one call, checksum included, "
            "TCP; over the library called bare in one process, which checks nothing and gives "
            "memory of its own",
        )
        for op in ("put", "get")
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    figures: list[Figure] = []
    with InfinistoreServer() as server:
        server.enter()
        client, other = bare_client(), bare_client()
        for label, nbytes, count in SIZES:
            memory = Memory([nbytes] * count, region_id=1)
            memory.array[:] = np.random.default_rng(0).integers(0, 255, len(memory.array), np.uint8)
            assert memory.region is not None
            services = Host(server.directory, [memory.region]).services
            url = f"{server.inner_url}?longest_deadline_s=0.1"
            store = plugins.open_connector(url, services)
            figures += of_size(store, client, other, memory, label, nbytes, count, args.rounds)
            store.close()
    save(figures, args.out)
    show(args.out)


if __name__ == "__main__":
    main()
