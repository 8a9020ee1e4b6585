"""A throw-away server for tests and benchmarks: a real one, in a network namespace of its own.

    python -m lmcache_backend_infinistore.server COMMAND {url} ...

runs COMMAND with ``{url}`` replaced, and stops the server after it.  It serves TCP only: its RDMA
device is a stub (see warden.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from lmcache_backend_infinistore.warden import SERVICE_PORT
from lmcache_conformance.throwaway import run_with

_CLONE_NEWNET = 0x40000000


class InfinistoreServer:
    """An InfiniStore server with a pool of 1 GiB, which is its least.

    It ends with this process, also when that is killed.

    Args:
        block_kib: least room of a stored name; large ones make a store that is soon full.

    Attributes:
        port: on 127.0.0.1, relayed to the server; the same over restarts.
        directory: of its log.

    Raises:
        RuntimeError: it can't be started here; the message says the fix.
    """

    def __init__(self, *, block_kib: int = 16) -> None:
        if importlib.util.find_spec("infinistore") is None:
            raise RuntimeError(
                "infinistore is not installed; try: pip install "
                "'lmcache-backend-infinistore[client]'"
            )
        self.directory = Path(tempfile.mkdtemp(prefix="lmc-infinistore-"))
        self._log = self.directory / "log"
        command = [sys.executable, "-m", "lmcache_backend_infinistore.warden"]
        with self._log.open("wb") as log:
            self._warden = subprocess.Popen(
                [*command, str(self.directory), str(block_kib)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            self.port = int(self._answer())
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Over the relay."""
        return f"infinistore://127.0.0.1:{self.port}"

    @property
    def inner_url(self) -> str:
        """For a process that is in the server's namespace: see `enter`."""
        return f"infinistore://127.0.0.1:{SERVICE_PORT}"

    def start(self) -> None:
        """Start it, empty, at the same address; returns when it answers."""
        self.pid = int(self._tell("start"))

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self._tell("kill")

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        self._tell("freeze")

    def resume(self) -> None:
        """SIGCONT."""
        self._tell("resume")

    def enter(self) -> None:
        """Move this thread, and all that it starts from now on, to the server's network.

        Raises:
            OSError: not allowed; it takes root.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/proc/{self._warden.pid}/ns/net") as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def log(self) -> str:
        """What the server printed."""
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        """Kill it and remove its directory."""
        if self._warden.poll() is None and self._warden.stdin is not None:
            self._warden.stdin.close()
            try:
                self._warden.wait(5)
            except subprocess.TimeoutExpired:
                self._warden.kill()
                self._warden.wait()
        if self._warden.stdout is not None:
            self._warden.stdout.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> InfinistoreServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _tell(self, command: str) -> str:
        assert self._warden.stdin is not None
        self._warden.stdin.write(f"{command}\n")
        self._warden.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._warden.stdout is not None
        said = self._warden.stdout.readline().strip()
        word, _, rest = said.partition(" ")
        if word != "ok":
            raise RuntimeError(f"{said or 'the warden ended'}\n{self.log()[-2000:]}")
        return rest


@contextlib.contextmanager
def _served() -> Iterator[str]:
    with InfinistoreServer() as server:
        yield server.url


def main() -> int:
    """Run the command line with a server; its exit code."""
    return run_with(_served, __doc__)


if __name__ == "__main__":
    sys.exit(main())
