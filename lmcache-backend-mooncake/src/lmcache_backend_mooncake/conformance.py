"""What the conformance suite needs to judge this backend."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path

from lmcache_backend_mooncake.connector import name_of_key
from lmcache_backend_mooncake.network import private_network
from lmcache_backend_mooncake.server import MooncakeServer
from lmcache_conformance import TcpHarness

_BARE = """
import sys
from mooncake.store import MooncakeDistributedStore
master, op, name = sys.argv[1:]
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", master) == 0
if op == "get":
    sys.stdout.buffer.write(b"1" + store.get(name) if store.is_exist(name) == 1 else b"0")
else:
    assert store.put(name, sys.stdin.buffer.read()) == 0
sys.stdout.flush()
store.close()
"""
"""The library without us, in a process of its own since it blocks the one that it is in."""


class MooncakeHarness(TcpHarness):
    """A real master behind the fault proxy, and a process that lends memory.

    Values travel past the proxy, between client and lender: `stall` holds those up too.
    """

    name = "mooncake"

    def start(self, scratch: Path) -> None:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(private_network())
        try:
            self.server = self._stack.enter_context(MooncakeServer())
            self._small: MooncakeServer | None = None
            super().start(scratch)
        except BaseException:
            self._stack.close()
            raise

    def stop(self) -> None:
        super().stop()
        self._stack.close()

    def address(self) -> tuple[str, int] | Path:
        return ("127.0.0.1", self.server.port)

    def url_at(self, host: str, port: int) -> str:
        return f"mooncake://{host}:{port}"

    def kill(self) -> None:
        self.server.kill()

    def restart(self) -> None:
        self.server.start()

    def stall(self) -> AbstractContextManager[None]:
        return self._all_stalled()

    @contextlib.contextmanager
    def _all_stalled(self) -> Iterator[None]:
        with super().stall():
            self.server.freeze_lenders()
            try:
                yield
            finally:
                self.server.resume()

    def small_url(self, size_bytes: int) -> str:
        if self._small is None:
            small = MooncakeServer(segment_bytes=size_bytes)
            self._small = self._stack.enter_context(small)
        return self._small.url

    def bad_urls(self) -> list[str]:
        return [
            "mooncake://127.0.0.1:1",
            "mooncake://127.0.0.1",
            f"mooncake://127.0.0.1:{self.server.port}/path",
            f"{self.direct_url()}?replicas=0",
        ]

    def raw_get(self, key: bytes) -> bytes | None:
        said = self._bare("get", key, b"")
        return said[1:] if said[:1] == b"1" else None

    def raw_put(self, key: bytes, content: bytes) -> None:
        self._bare("put", key, content)

    def server_version(self) -> str:
        for name in ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                return f"{name} {metadata.version(name)}"
        return ""

    def _bare(self, op: str, key: bytes, content: bytes) -> bytes:
        master = f"127.0.0.1:{self.server.port}"
        command = [sys.executable, "-c", _BARE, master, op, name_of_key(key)]
        return subprocess.run(command, input=content, capture_output=True, check=True).stdout
