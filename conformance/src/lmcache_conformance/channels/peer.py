"""The other side of a channel in a process of its own, which may be frozen or killed.

`Peer` is the check's end; ``python -m lmcache_conformance.channels.peer_main`` is the other, one
JSON line a request and an answer.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from lmcache_conformance.channels.sides import Source
from lmcache_conformance.frame import Wrong

START_LIMIT_S = 30.0
CALL_LIMIT_S = 20.0


class Peer:
    """The check's end.

    Attributes:
        metadata: of the channel there.
        pid: of the process.

    Raises:
        Wrong: the channel can't be opened there.
    """

    def __init__(self, source: Source, *, secret: bytes, nbytes: int) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lmcache_conformance.channels.peer_main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
        )
        self.pid = self._process.pid
        opened = self.call(
            "open", limit_s=START_LIMIT_S, url=source.url, plugin=source.plugin,
            secret=secret.hex(), nbytes=nbytes,
        )  # fmt: skip
        self.metadata = bytes.fromhex(opened["metadata"])

    def call(self, op: str, limit_s: float = CALL_LIMIT_S, **arguments: Any) -> dict[str, Any]:
        """What the process answers.

        Raises:
            Wrong: it raised, died, or does not answer.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
            line, died = self._process.stdout.readline() if ready else b"", bool(ready)
        except BrokenPipeError:
            line, died = b"", True
        if not line:
            why = "died" if died else f"does not answer within {limit_s:.0f} s"
            raise Wrong(f"the process of the peer {why}, in {op}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Wrong(f"{op} in the process of the peer raised {answer['error']}")
        return answer

    def grant(self, peer: str, offset: int, nbytes: int, access: str = "write") -> bytes:
        """A ticket."""
        found = self.call("grant", peer=peer, offset=offset, nbytes=nbytes, access=access)
        return bytes.fromhex(found["ticket"])

    def move(
        self, peer: str, ticket: bytes, pieces: Sequence[Sequence[int]], *, reads: bool = False
    ) -> list[str]:
        """The names of the answers of one transfer that it makes."""
        found = self.call("move", peer=peer, ticket=ticket.hex(), pieces=pieces, reads=reads)
        return list(found["answers"])

    def freeze(self) -> None:
        """Let it stand still."""
        self._process.send_signal(signal.SIGSTOP)
        # It stands once the kernel says so, not when the signal is sent.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait(10)

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass  # what was not sent goes nowhere
