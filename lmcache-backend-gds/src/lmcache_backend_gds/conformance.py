"""What the conformance suite needs to judge this backend, on system calls and on kvikio."""

from __future__ import annotations

import os
import tempfile
from importlib import metadata
from pathlib import Path

from lmcache_backend_gds import driver, stub
from lmcache_conformance.builtin import FileHarness
from lmcache_conformance.frame import Inconclusive
from lmcache_core.sdk import ConfigError


class GdsHarness(FileHarness):
    """Files below the scratch directory, moved by system calls."""

    name = "gds"
    options = "?io=posix"

    def url(self) -> str:
        return super().url().replace("file:", "gds:", 1)

    def small_url(self, size_bytes: int) -> str:
        return super().small_url(size_bytes).replace("file:", "gds:", 1)

    def bad_urls(self) -> list[str]:
        urls = [each.replace("file:", "gds:", 1) for each in super().bad_urls()]
        root = f"gds://{self.scratch}/kv"
        wrong = ("io=cuda", "queue_depth=0", "task_size_bytes=1", "max_stuck=65", "direct=maybe")
        return [*urls, *(f"{root}?{each}" for each in wrong)]


class GdsDirectHarness(GdsHarness):
    """The same with O_DIRECT and every put synced."""

    name = "gds-direct"
    options = "?io=posix&direct=1&durability=host"

    def small_url(self, size_bytes: int) -> str:
        url = super().small_url(size_bytes)
        trial = f"{self._small}/trial"
        try:
            os.close(os.open(trial, os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600))
        except OSError as error:
            raise Inconclusive(f"tmpfs has no O_DIRECT in this kernel: {error}") from error
        os.unlink(trial)
        return url


class GdsKvikioHarness(GdsHarness):
    """Moved by kvikio; where there is no driver, host memory only and with the stub of `stub`.

    The stub goes into this process by its path, and into child processes by LD_LIBRARY_PATH,
    which is put back at the end.
    """

    name = "gds-kvikio"
    options = "?io=kvikio"
    _folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self, scratch: Path) -> None:
        super().start(scratch)
        if not driver.look().kvikio:
            raise ConfigError("kvikio is not installed", backend="gds", hint=driver.INSTALL)
        if driver.look().libcuda:
            return
        self._folder = tempfile.TemporaryDirectory(prefix="lmc-gds-")
        stub.load(stub.build(Path(self._folder.name)))
        self._before = os.environ.get("LD_LIBRARY_PATH")
        folders = [self._folder.name, *([self._before] if self._before else [])]
        os.environ["LD_LIBRARY_PATH"] = ":".join(folders)

    def stop(self) -> None:
        super().stop()
        if self._folder is None:
            return
        if self._before is None:
            del os.environ["LD_LIBRARY_PATH"]
        else:
            os.environ["LD_LIBRARY_PATH"] = self._before
        self._folder.cleanup()

    def server_version(self) -> str:
        names = [d.metadata["Name"] for d in metadata.distributions()]
        name = next((each for each in names if each.startswith("kvikio")), "kvikio")
        cuda = "a stub of libcuda" if self._folder else driver.LIBCUDA
        return f"{name} {metadata.version(name)}, {cuda}"
