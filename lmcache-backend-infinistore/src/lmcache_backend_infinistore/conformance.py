"""What the conformance suite needs to judge this backend."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from lmcache_backend_infinistore.layout import Head, head_name, payload_name
from lmcache_backend_infinistore.server import InfinistoreServer
from lmcache_conformance import TcpHarness

_LIMIT_S = 30.0
_SMALL_POOL_BYTES = 1 << 30
_RAW = """
import json, sys
import infinistore, numpy
port, op, name = json.loads(sys.argv[1])
config = infinistore.ClientConfig(
    host_addr="127.0.0.1", service_port=port, connection_type=infinistore.TYPE_TCP,
    log_level="error",
)
client = infinistore.InfinityConnection(config)
client.connect()
sys.stdout.flush()
if op == "read":
    sys.stderr.buffer.write(client.tcp_read_cache(name).tobytes())
elif op == "exists":
    sys.stderr.write("yes" if client.check_exist(name) else "")
elif op == "delete":
    client.delete_keys([name])
else:
    data = numpy.frombuffer(sys.stdin.buffer.read(), numpy.uint8)
    client.tcp_write_cache(name, data.ctypes.data, len(data))
"""


class RawClient:
    """The library called bare, each time in a process of its own: it may hang and crash.

    Raises:
        RuntimeError: that process crashed.
        subprocess.TimeoutExpired: it hung for ``limit_s``.
    """

    def __init__(self, port: int, limit_s: float = _LIMIT_S) -> None:
        self._port = port
        self._limit_s = limit_s

    def exists(self, name: str) -> bool:
        """Whether ``name`` is there."""
        return bool(self._run("exists", name))

    def read(self, name: str) -> bytes:
        """Its bytes."""
        return self._run("read", name)

    def write(self, name: str, content: bytes) -> None:
        """Store ``content``."""
        self._run("write", name, content)

    def delete(self, name: str) -> None:
        """Remove it."""
        self._run("delete", name)

    def _run(self, op: str, name: str, content: bytes = b"") -> bytes:
        command = [sys.executable, "-c", _RAW, json.dumps([self._port, op, name])]
        done = subprocess.run(command, input=content, capture_output=True, timeout=self._limit_s)
        if done.returncode:
            raise RuntimeError(f"{op} {name} ended with {done.returncode}: {done.stderr[-500:]!r}")
        return done.stderr


class InfinistoreHarness(TcpHarness):
    """A real server over TCP, in a network namespace of its own."""

    name = "infinistore"

    def start(self, scratch: Path) -> None:
        self.server = InfinistoreServer()
        self.raw = RawClient(self.server.port)
        self._small: InfinistoreServer | None = None
        super().start(scratch)

    def stop(self) -> None:
        super().stop()
        self.server.close()
        if self._small is not None:
            self._small.close()

    def address(self) -> tuple[str, int] | Path:
        return ("127.0.0.1", self.server.port)

    def url_at(self, host: str, port: int) -> str:
        return f"infinistore://{host}:{port}"

    def kill(self) -> None:
        self.server.kill()

    def restart(self) -> None:
        self.server.start()

    def small_url(self, size_bytes: int) -> str:
        if self._small is None:
            # The least pool is 1 GiB.  A value of 1 MiB takes two blocks, head and payload.
            values = size_bytes >> 20
            self._small = InfinistoreServer(block_kib=_SMALL_POOL_BYTES // (2 * values) >> 10)
        return self._small.url

    def bad_urls(self) -> list[str]:
        port = self.server.port
        return [
            "infinistore://127.0.0.1:1",
            "infinistore://",
            f"infinistore://127.0.0.1:{port}/folder",
            f"infinistore://127.0.0.1:{port}?helpers=0",
            f"infinistore://127.0.0.1:{port}?connection=carrier-pigeon",
        ]

    def corrupt(self, key: bytes) -> None:
        name, content = self._payload(key)
        middle = len(content) // 2
        changed = bytes([content[middle] ^ 0x10])
        self.raw.write(name, content[:middle] + changed + content[middle + 1 :])

    def truncate(self, key: bytes) -> None:
        name, content = self._payload(key)
        self.raw.write(name, content[:-5])

    def lose(self, key: bytes) -> None:
        self.raw.delete(self._payload(key)[0])

    def raw_get(self, key: bytes) -> bytes | None:
        return self._payload(key)[1] if self.raw.exists(head_name(key)) else None

    def server_version(self) -> str:
        return f"infinistore {metadata.version('infinistore')}, TCP, stub RDMA device"

    def _payload(self, key: bytes) -> tuple[str, bytes]:
        """Name and bytes of the payload of ``key``."""
        head = Head.decode(key, self.raw.read(head_name(key)))
        assert head is not None, "the key is not there"
        name = payload_name(key, head.version)
        return name, self.raw.read(name)
