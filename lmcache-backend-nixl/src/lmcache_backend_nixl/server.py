"""A throw-away S3 service for tests and the demo: moto, on loopback only.

    python -m lmcache_backend_nixl.server COMMAND {url} ...

runs COMMAND with ``{url}`` replaced, and stops the service after it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from lmcache_conformance.throwaway import free_port, run_with

START_LIMIT_S = 30.0
BUCKET = "kvbucket"
LOGIN = {"access_key": "test", "secret_key": "testing"}


class S3Server:
    """moto's server with one empty bucket.  What it holds is gone when it ends.

    Raises:
        RuntimeError: moto is missing, or does not start; the message says the fix.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self._log = Path(tempfile.mkdtemp(prefix="lmc-s3-")) / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def endpoint(self) -> str:
        """Of the service."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """What a connector opens."""
        return url_at(self.endpoint)

    def start(self) -> None:
        """Start it, on the same port each time; returns when the bucket is there."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        end_s = time.monotonic() + START_LIMIT_S
        while not self._makes_bucket():
            if self._process.poll() is not None or time.monotonic() > end_s:
                self.kill()
                tail = self._log.read_text(errors="replace")[-2000:]
                raise RuntimeError(
                    f"the service did not start; is 'moto[server]' installed?\n{tail}"
                )
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        if self._process is not None:
            self.resume()
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered from here on."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        # Until then its other threads may run on, on a busy machine for long.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT."""
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Kill it and remove its log."""
        self.kill()
        self._log.unlink(missing_ok=True)
        self._log.parent.rmdir()

    def __enter__(self) -> S3Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _makes_bucket(self) -> bool:
        # moto does not check signatures.
        request = urllib.request.Request(f"{self.endpoint}/{BUCKET}", method="PUT")
        try:
            with urllib.request.urlopen(request, timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def url_at(endpoint: str) -> str:
    """The bucket as it is seen at ``endpoint``."""
    login = "&".join(f"{name}={text}" for name, text in LOGIN.items())
    return f"nixl+obj://{BUCKET}?endpoint={endpoint}&{login}"


@contextlib.contextmanager
def _served() -> Iterator[str]:
    with S3Server() as server:
        yield server.url


def main() -> int:
    """Run the command line with a service; its exit code."""
    return run_with(_served, __doc__)


if __name__ == "__main__":
    sys.exit(main())
