"""gds:// beside bare loops over the same bytes and files: pwrite and rename, preadv.

    python benchmarks/backend_gds.py [--out build/bench.json] [--rounds 9] [--directory DIR]

Where kvikio is installed its path runs too, beside bare CuFile; without a driver on the stub libcuda
of the package, which moves host memory only.  Those figures have no target.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from figures import Figure, save, show, throughput
from value_files import Times, filled, times_beside

from lmcache_backend_gds import driver, stub
from lmcache_backend_gds.connector import GdsConnector
from lmcache_conformance import Memory
from lmcache_conformance.rig import Host, entry_points_of
from lmcache_core import plugins

MIB = 1 << 20
SIZES = (("1MiB", MIB, 128), ("32MiB", 32 * MIB, 4))
TURNS = 4
"""A worker may come to lie badly for as long as it lives, so there are several."""

BARE = {
    "posix": "over bare open, pwrite or preadv, rename of the same files by one thread",
    "kvikio": "over bare CuFile and rename, host memory",
}


class Bare:
    """The same bytes and files, with nothing around them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def put(self, name: str, source: memoryview) -> None:
        """Write a file aside and rename it."""
        path = f"{self.folder}/{name}"
        fd = os.open(path + ".tmp", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        at = 0
        while at < len(source):
            at += os.pwrite(fd, source[at:], at)
        os.close(fd)
        os.rename(path + ".tmp", path)

    def get(self, path: str, target: memoryview) -> None:
        """Read a whole file of known size."""
        fd = os.open(path, os.O_RDONLY)
        at = 0
        while at < len(target):
            at += os.preadv(fd, [target[at:]], at)
        os.close(fd)


class BareCuFile(Bare):
    """CuFile by name, and a rename."""

    def __init__(self, folder: Path) -> None:
        import kvikio

        super().__init__(folder)
        self.open: Callable[[str, str], Any] = kvikio.CuFile

    def put(self, name: str, source: memoryview) -> None:
        path = f"{self.folder}/{name}"
        with self.open(path + ".tmp", "w") as file:
            assert file.pwrite(source).get() == len(source)
        os.rename(path + ".tmp", path)

    def get(self, path: str, target: memoryview) -> None:
        with self.open(path, "r") as file:
            assert file.pread(target).get() == len(target)


def open_gds(folder: Path, io: str) -> GdsConnector:
    url = f"gds://{folder}?io={io}"
    opened = plugins.open_connector(url, Host(folder).services, entry_points_of(url, ""))
    assert isinstance(opened, GdsConnector)
    return opened


def times_of(
    base: Path, io: str, bare_class: type[Bare], nbytes: int, count: int, rounds: int
) -> Times:
    """Seconds of put and get in each round, on files and workers of their own."""
    room = Path(tempfile.mkdtemp(dir=base))
    ours, bare = open_gds(room / "ours", io), bare_class(room / "bare")
    memory = filled(Memory([nbytes] * count))
    views = [buffer.view for buffer in memory.buffers() if buffer.view is not None]
    times = times_beside(
        room,
        ours,
        memory,
        lambda names: [bare.put(name, view) for name, view in zip(names, views)],
        lambda paths: [bare.get(path, view) for path, view in zip(paths, views)],
        rounds,
    )
    shutil.rmtree(room)
    return times


def of_size(
    base: Path, name: str, io: str, bare_class: type[Bare], size: tuple[str, int, int], rounds: int
) -> list[Figure]:
    """Figures of put and get, out of `TURNS` times so many rounds."""
    label, nbytes, count = size
    turns = [times_of(base, io, bare_class, nbytes, count, rounds) for _ in range(TURNS)]
    figures = []
    for op in ("put", "get"):
        times = {run: [s for turn in turns for s in turn[op][run]] for run in turns[0][op]}
        method = f"{op} of {count} values in one call, queue depth 4, page cache, {BARE[io]}"
        figure = throughput(f"{name}{op}_{label}", nbytes * count, times, 0.90, method,
                            file="file://")  # fmt: skip
        figures.append(figure if io == "posix" else replace(figure, target=None, met=None))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    paths: list[tuple[str, str, type[Bare]]] = [("gds.", "posix", Bare)]
    with tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("kvikio") is not None:
            if not driver.look().libcuda:
                stub.load(stub.build(Path(folder)))
            paths.append(("gds.kvikio_", "kvikio", BareCuFile))
        figures = [
            figure
            for name, io, bare in paths
            for size in SIZES
            for figure in of_size(args.directory, name, io, bare, size, args.rounds)
        ]
    save(figures, args.out)
    show(args.out)


if __name__ == "__main__":
    main()
