"""Times of a store of plain files beside a bare loop and ``file://``, over the same files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from figures import interleave

from lmcache_conformance import Memory, within
from lmcache_core.connectors.file import FileConnector
from lmcache_core.sdk import RemoteConnector, Status

Times = dict[str, dict[str, list[float]]]
Move = Callable[[Sequence[str]], object]


def filled(memory: Memory) -> Memory:
    """``memory`` with bytes that no two values share."""
    memory.array[:] = np.random.default_rng(0).integers(0, 255, len(memory.array), np.uint8)
    return memory


def times_beside(
    room: Path, ours: RemoteConnector, memory: Memory, put: Move, get: Move, rounds: int
) -> Times:
    """Seconds of put and get in each round: ``ours``, ``raw`` and ``file``.

    Args:
        room: ``ours`` keeps its files in ``room/ours``.
        memory: values of one size, filled.
        put, get: bare, of file names and of whole paths.
    """
    sources, targets = memory.buffers(read_only=True), memory.buffers()
    nbytes, before = sources[0].nbytes, memory.array.copy()
    peer, reader = FileConnector(f"{room}/file"), FileConnector(f"{room}/ours")
    names = [f"{i:03d}" for i in range(len(sources))]
    keys = [each.encode() for each in names]
    # All read the same files: where a file's pages lie makes a fifth of the speed.
    paths = [f"{room}/ours/v1/{sum(key) & 0xFF:02x}/{key.hex()}" for key in keys]

    def put_by(store: RemoteConnector) -> None:
        assert set(store.put_from(keys, sources, within(60))) == {Status.OK}

    def get_by(store: RemoteConnector) -> None:
        results = store.get_into(keys, targets, within(60))
        assert {(each.status, each.nbytes) for each in results} == {(Status.OK, nbytes)}

    puts: dict[str, Callable[[], object]] = {
        "ours": lambda: put_by(ours),
        "raw": lambda: put(names),
        "file": lambda: put_by(peer),
    }
    gets: dict[str, Callable[[], object]] = {
        "ours": lambda: get_by(ours),
        "raw": lambda: get(paths),
        "file": lambda: get_by(reader),
    }
    for run in (*puts.values(), *gets.values()):
        run()
    times = {"put": interleave(puts, rounds, os.sync), "get": interleave(gets, rounds)}
    assert np.array_equal(memory.array, before)
    for store in (ours, peer, reader):
        store.close()
    return times
