"""Harnesses of core's own connectors, ``memory`` and ``file``."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from lmcache_conformance.harness import Harness, small_disk, unmount


class MemoryHarness(Harness):
    """A dict in this process."""

    name = "memory"

    def url(self) -> str:
        return "memory://"

    def bad_urls(self) -> list[str]:
        return ["memory://?size=-1", "memory://?size=many"]

    def small_url(self, size_bytes: int) -> str:
        return f"memory://?size={size_bytes}"


class FileHarness(Harness):
    """Files below the scratch directory; the small store is a file system of its own."""

    name = "file"
    options = ""
    _small: Path | None = None

    def url(self) -> str:
        return f"file://{self.scratch}/kv{self.options}"

    def small_url(self, size_bytes: int) -> str:
        self._small = small_disk(self.scratch / "small", size_bytes)
        return f"file://{self._small}/kv{self.options}"

    def stop(self) -> None:
        if self._small is not None:
            unmount(self._small)

    def bad_urls(self) -> list[str]:
        taken = self.scratch / "taken"
        taken.touch(mode=0o600)
        return ["file://relative/kv", f"file://{taken}", f"file://{taken}/below", "file:"]

    def litter(self) -> None:
        root = self.scratch / "kv" / "v1"
        for shard in ("00", "zz", "notes", "abc"):
            (root / shard).mkdir(mode=0o700, exist_ok=True)
            for name in ("README", "6", "zz", "a1.tmp", "A1", "abc"):
                (root / shard / name).touch(mode=0o600)
        (root / "00" / "a1").mkdir(mode=0o700, exist_ok=True)
        (root / "notes" / "62").touch(mode=0o600)
        (root / "README").touch(mode=0o600)

    def refusals(self) -> Mapping[str, AbstractContextManager[Collection[str]]]:
        return {"a file is where its directory was": self._displaced()}

    @contextmanager
    def _displaced(self) -> Iterator[Collection[str]]:
        root, away = self.scratch / "kv" / "v1", self.scratch / "kv" / "away"
        root.rename(away)
        root.touch(mode=0o600)
        try:
            yield ("open", "exists", "get", "put", "delete", "scan", "health")
        finally:
            root.unlink()
            away.rename(root)

    def corrupt(self, key: bytes) -> None:
        path = self._path(key)
        at = path.stat().st_size // 2
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 0x10]))

    def truncate(self, key: bytes) -> None:
        path = self._path(key)
        os.truncate(path, path.stat().st_size * 2 // 3)

    def raw_get(self, key: bytes) -> bytes | None:
        path = self._path(key)
        return path.read_bytes() if path.exists() else None

    def raw_put(self, key: bytes, content: bytes) -> None:
        path = self._path(key)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(content)

    def _path(self, key: bytes) -> Path:
        return self.scratch / "kv" / "v1" / f"{sum(key) & 0xFF:02x}" / key.hex()


class SyncedFileHarness(FileHarness):
    """With every put synced to the device."""

    name = "file-synced"
    options = "?durability=host"
