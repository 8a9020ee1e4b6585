"""A connector in a process of its own, driven from the check: it may die, and only that.

`Child` is the check's side; ``python -m lmcache_conformance.child`` is the other, one JSON line a
request and an answer.  The process opens the backend anew from its URL.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from lmcache_conformance import shim
from lmcache_conformance.frame import Wrong

START_LIMIT_S = 30.0


def digest(content: bytes) -> str:
    """How a value is named between the processes."""
    return hashlib.sha256(content).hexdigest()


class Died(Exception):
    """The child's process has ended; ``code`` as of `subprocess`, negative for a signal."""

    def __init__(self, code: int, errors: str) -> None:
        super().__init__(f"the process ended with {code}: {errors[-400:]}")
        self.code = code


class Child:
    """The check's side.

    Args:
        url, module: what to open; see `Harness`.
        scratch: where its files go.
        preload: put the I/O fault shim under it.

    Raises:
        Inconclusive: the shim can't be built.
        Wrong: it does not start.
    """

    def __init__(self, url: str, module: str, scratch: Path, *, preload: bool = False) -> None:
        number = time.monotonic_ns()
        self._errors = scratch / f"child-{number}.log"
        environment = dict(os.environ)
        if preload:
            self.control = shim.Control(scratch / f"shim-{number}")
            environment["LD_PRELOAD"] = str(shim.built())
            environment["LMC_SHIM"] = str(self.control.path)
        command = [sys.executable, "-m", "lmcache_conformance.child_main"]
        with self._errors.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd=scratch,
            )
        opened = self.call("open", url=url, module=module, limit_s=START_LIMIT_S)
        if "error" in opened:
            self.close()
            raise Wrong(f"a new process can't open the store: {opened['error']}")

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def call(self, op: str, *, limit_s: float = 60.0, **arguments: Any) -> dict[str, Any]:
        """Do ``op`` there; see `child_main` for what it takes and gives.

        Raises:
            Died: the process ended.
            Wrong: no answer within ``limit_s``.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        if not ready:
            self._process.kill()
            raise Wrong(f"{op} did not return within {limit_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def later(self, op: str, **arguments: Any) -> Pending:
        """Start ``op`` there and go on."""
        return Pending(self, op, arguments)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it."""
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass  # what was not sent to a dead child

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _died(self) -> Died:
        code = self._process.wait()
        return Died(code, self._errors.read_text(errors="replace").strip())


class Pending:
    """A call that runs."""

    def __init__(self, child: Child, op: str, arguments: dict[str, Any]) -> None:
        self._answer: dict[str, Any] = {}
        self._error: Exception | None = None

        def run() -> None:
            try:
                self._answer = child.call(op, **arguments)
            except Exception as error:  # raised again by `result`
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def result(self) -> dict[str, Any]:
        """The answer; waits for it."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._answer
