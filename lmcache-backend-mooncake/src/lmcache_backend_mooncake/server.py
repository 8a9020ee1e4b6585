"""A throw-away store for tests, benchmarks and the demo: a master, and a process that lends memory.

    python -m lmcache_backend_mooncake.server COMMAND {url} ...

runs COMMAND with ``{url}`` replaced, and stops the store after it.  All of it runs in a network of
its own with loopback only, COMMAND included: Mooncake's clients listen on every interface.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from lmcache_backend_mooncake.library import program
from lmcache_backend_mooncake.network import is_private, private_network
from lmcache_conformance.throwaway import free_port, run_with

START_LIMIT_S = 20.0
_MIB = 1 << 20


class MooncakeServer:
    """``mooncake_master``, and lenders of memory; in a directory of its own.

    Args:
        segment_bytes: what each lender lends.
        lenders: processes that lend.
        ssd_path: where lent memory overflows to; "" for nowhere.
        arguments: further ones for the master, such as ``("-client_ttl=10",)``.
        environment: further variables for the lenders.

    Raises:
        RuntimeError: the network can be reached from outside, a program is missing, or it does
            not start; the message says the fix.
    """

    def __init__(
        self,
        *,
        segment_bytes: int = 512 * _MIB,
        lenders: int = 1,
        ssd_path: str = "",
        arguments: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if not is_private():
            raise RuntimeError("not in this network: enter network.private_network() first")
        self._program = program("mooncake_master")
        self.directory = Path(tempfile.mkdtemp(prefix="lmc-mooncake-"))
        self.port, self._metrics_port = free_port(), free_port()
        self._segment_bytes, self._ssd_path = segment_bytes, ssd_path
        self._arguments = arguments
        self._environment = {**os.environ, **(environment or {})}
        self._master: subprocess.Popen[bytes] | None = None
        self.lenders: list[subprocess.Popen[bytes]] = []
        try:
            self.start()
            for _ in range(lenders):
                self.lend()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Of the master."""
        return f"mooncake://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of the master."""
        assert self._master is not None
        return self._master.pid

    def start(self) -> None:
        """Start the master, on the same port each time; returns when it listens."""
        # fmt: off
        command = [
            self._program, f"-rpc_port={self.port}", "-rpc_address=127.0.0.1",
            "-metrics_host=127.0.0.1", f"-metrics_port={self._metrics_port}",
            "-client_ttl=4", "-logtostderr", *self._arguments,
        ]
        # fmt: on
        if self._ssd_path:
            command += ["-enable_offload=true", "-offload_on_evict=true"]
        with (self.directory / "master.log").open("ab") as log:
            self._master = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory
            )
        end_s = time.monotonic() + START_LIMIT_S
        while not _listens(self.port):
            if self._master.poll() is not None or time.monotonic() > end_s:
                raise RuntimeError(f"the master did not start:\n{self._log('master.log')}")
            time.sleep(0.02)

    def lend(self) -> subprocess.Popen[bytes]:
        """Start one more process that lends memory; returns when it does."""
        name = f"lender{len(self.lenders)}.log"
        # fmt: off
        command = [
            sys.executable, "-m", "lmcache_backend_mooncake.segment",
            "--master", f"127.0.0.1:{self.port}", "--bytes", str(self._segment_bytes),
            "--local-hostname", "127.0.0.1",
        ]
        # fmt: on
        if self._ssd_path:
            command += ["--ssd-path", f"{self._ssd_path}/{len(self.lenders)}"]
        with (self.directory / name).open("ab") as log:
            lender = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                cwd=self.directory, env=self._environment,
            )  # fmt: skip
        self.lenders.append(lender)
        assert lender.stdout is not None
        if not lender.stdout.readline():
            raise RuntimeError(f"no memory was lent:\n{self._log(name)}")
        return lender

    def kill(self) -> None:
        """SIGKILL for the master, as a crash; the lenders live on and come back to it."""
        if self._master is not None:
            self._signal(self._master, signal.SIGCONT)
            self._master.kill()
            self._master.wait()
            self._master = None

    def kill_lenders(self) -> None:
        """SIGKILL for them: the values are gone, and the master does not know yet."""
        for lender in self.lenders:
            self._signal(lender, signal.SIGCONT)
            lender.kill()
            lender.wait()
            if lender.stdout is not None:
                lender.stdout.close()
        self.lenders.clear()

    def freeze(self) -> None:
        """SIGSTOP for all: connections stay open, nothing is answered from here on."""
        for process in (self._master, *self.lenders):
            if process is not None:
                self._signal(process, signal.SIGSTOP)

    def freeze_lenders(self) -> None:
        """SIGSTOP for those whose memory it is: the master answers, values do not come."""
        for process in self.lenders:
            self._signal(process, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        for process in (self._master, *self.lenders):
            if process is not None:
                self._signal(process, signal.SIGCONT)

    def close(self) -> None:
        """End all and remove what they left."""
        self.kill_lenders()
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> MooncakeServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _signal(self, process: subprocess.Popen[bytes], number: int) -> None:
        if process.poll() is None:
            os.kill(process.pid, number)
            if number == signal.SIGSTOP:
                # Until then its other threads may run on, on a busy machine for long.
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _log(self, name: str) -> str:
        return (self.directory / name).read_text(errors="replace")[-2000:]


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _served() -> Iterator[str]:
    with private_network(), MooncakeServer() as server:
        yield server.url


def main() -> int:
    """Run the command line with a store; its exit code."""
    return run_with(_served, __doc__)


if __name__ == "__main__":
    sys.exit(main())
