"""nixl+posix:// beside the bare library: the same agent, files and batches, by one thread.

python benchmarks/backend_nixl.py [--out build/bench.json] [--rounds 9] [--directory DIR]
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from figures import Figure, save, show, throughput
from value_files import Times, filled, times_beside

from lmcache_backend_nixl.library import load
from lmcache_conformance import Memory
from lmcache_conformance.rig import Host, entry_points_of
from lmcache_core import plugins

MIB = 1 << 20
SIZES = (("1MiB", MIB, 64), ("32MiB", 32 * MIB, 4))
TURNS = 3
"""A thread may come to lie badly for as long as it lives, so there are several."""
METHOD = "over the bare library: one agent, memory registered once, one transfer over the same files, rename; page cache"


class Bare:
    """The library as its examples use it; files are published by rename, as ours are."""

    def __init__(self, folder: Path, memory: Memory) -> None:
        api = load("POSIX")
        self.folder = folder
        folder.mkdir()
        self.agent = api.nixl_agent("bare", api.nixl_agent_config(backends=[]))
        self.agent.create_backend("POSIX", {"use_aio": "true", "ios_pool_size": "4096"})
        row = (memory.array.ctypes.data, len(memory.array), 0, "")
        self.held = self.agent.register_memory([row], mem_type="DRAM")

    def put(self, names: Sequence[str], addresses: Sequence[int], nbytes: int) -> None:
        """Write files aside and rename them."""
        paths = [f"{self.folder}/{name}" for name in names]
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        fds = [os.open(path + ".tmp", flags, 0o600) for path in paths]
        self._move("WRITE", fds, addresses, nbytes)
        for path in paths:
            os.rename(path + ".tmp", path)

    def get(self, paths: Sequence[str], addresses: Sequence[int], nbytes: int) -> None:
        """Read whole files of known size."""
        self._move("READ", [os.open(path, os.O_RDONLY) for path in paths], addresses, nbytes)

    def _move(self, op: str, fds: Sequence[int], addresses: Sequence[int], nbytes: int) -> None:
        agent = self.agent
        files = agent.register_memory([(0, nbytes, fd, "") for fd in fds], mem_type="FILE")
        near = agent.get_xfer_descs([(at, nbytes, 0) for at in addresses], mem_type="DRAM")
        far = agent.get_xfer_descs([(0, nbytes, fd) for fd in fds], mem_type="FILE")
        handle = agent.initialize_xfer(op, near, far, "bare")
        state = agent.transfer(handle)
        while state == "PROC":
            time.sleep(0)
            state = agent.check_xfer_state(handle)
        assert state == "DONE"
        agent.release_xfer_handle(handle)
        agent.deregister_memory(files)
        for fd in fds:
            os.close(fd)


def times_of(base: Path, nbytes: int, count: int, rounds: int) -> Times:
    """Seconds of put and get in each round, on files and threads of their own."""
    room = Path(tempfile.mkdtemp(dir=base))
    url = f"nixl+posix://{room}/ours"
    memory = filled(Memory([nbytes] * count, region_id=1))
    assert memory.region is not None
    host = Host(room, [memory.region])
    ours = plugins.open_connector(url, host.services, entry_points_of(url, ""))
    bare = Bare(room / "bare", memory)
    at = [buffer.address for buffer in memory.buffers()]
    times = times_beside(
        room,
        ours,
        memory,
        lambda names: bare.put(names, at, nbytes),
        lambda paths: bare.get(paths, at, nbytes),
        rounds,
    )
    shutil.rmtree(room)
    return times


def of_size(base: Path, size: tuple[str, int, int], rounds: int) -> list[Figure]:
    """Figures of put and get, out of `TURNS` times so many rounds."""
    label, nbytes, count = size
    turns = [times_of(base, nbytes, count, rounds) for _ in range(TURNS)]
    figures = []
    for op in ("put", "get"):
        times = {run: [s for turn in turns for s in turn[op][run]] for run in turns[0][op]}
        figures.append(
            throughput(f"nixl.{op}_{label}", nbytes * count, times, 0.90,
                       f"{op} of {count} values in one call, {METHOD}", file="file://")
        )  # fmt: skip
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    figures = [row for size in SIZES for row in of_size(args.directory, size, args.rounds)]
    save(figures, args.out)
    show(args.out)


if __name__ == "__main__":
    main()
