"""What the conformance suite needs to judge this backend."""

from __future__ import annotations

from pathlib import Path

from lmcache_conformance import Harness, small_disk, unmount


class ShelfHarness(Harness):
    """A folder of the run; a full one is a file system of its own."""

    name = "shelf"
    _small: Path | None = None

    def url(self) -> str:
        return f"shelf://{self.scratch}/shelf"

    def small_url(self, size_bytes: int) -> str:
        self._small = small_disk(self.scratch / "small", size_bytes)
        return f"shelf://{self._small}/shelf"

    def bad_urls(self) -> list[str]:
        return ["shelf://relative/path", "shelf:///proc/nothing"]

    def stop(self) -> None:
        if self._small is not None:
            unmount(self._small)
