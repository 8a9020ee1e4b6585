"""`Helper`: one helper process, seen from the connector.

Its end is the only way to take memory back from a native call that hangs: once the kernel says
that the process is gone, nothing of it can touch a mapped buffer.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from lmcache_backend_infinistore import wire
from lmcache_backend_infinistore.regions import Regions
from lmcache_backend_infinistore.wire import Entry, Item, Op, Reply

KILL_GRACE_S = 0.15
"""How long a call waits for its killed helper to be gone, past the deadline."""
END_GRACE_S = 1.0
_LOG_LIMIT_BYTES = 256 << 10
_REPLY_BYTES = 2048


class HelperLost(Exception):
    """The helper ended, or says that the server is gone.

    ``setup`` says that it can't work here whatever the server does.
    """

    def __init__(self, reason: str, *, setup: bool = False) -> None:
        super().__init__(reason)
        self.setup = setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a helper is told at its start; ``host`` is an IPv4 address."""

    host: str
    port: int
    connection: str
    rdma_device: str
    link_type: str
    ib_port: int
    bounce_bytes: int


class Helper:
    """A started helper that is connected to the server.  For one thread at a time.

    Attributes:
        bounce: ``Settings.bounce_bytes`` of memory that the helper maps too.

    Raises:
        HelperLost: it can't start, or the server can't be reached.
        TimeoutError: not ready within ``limit_s``.
        OSError: this process lacks descriptors or memory.
    """

    def __init__(self, settings: Settings, limit_s: float) -> None:
        self._maps: dict[int, object] = {}
        size = wire.BOARD_BYTES + settings.bounce_bytes
        self._log = os.memfd_create("lmcache-infinistore-log", os.MFD_CLOEXEC)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process: subprocess.Popen[bytes] | None = None
        memory_fd = -1
        try:
            memory_fd = os.memfd_create("lmcache-infinistore", os.MFD_CLOEXEC)
            os.ftruncate(memory_fd, size)
            self._memory = mmap.mmap(memory_fd, size)
            self._board = memoryview(self._memory)[: wire.BOARD_BYTES]
            self.bounce = memoryview(self._memory)[wire.BOARD_BYTES :]
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "lmcache_backend_infinistore.helper",
                    str(theirs.fileno()), str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                pass_fds=(theirs.fileno(),),
            )  # fmt: skip
            theirs.close()
            hello = bytes([Op.HELLO]) + json.dumps(asdict(settings)).encode()
            socket.send_fds(self._control, [hello], [memory_fd])
            self._expect(Reply.READY, limit_s)
        except BaseException:
            self.end(kill=True)
            raise
        finally:
            theirs.close()
            if memory_fd >= 0:
                os.close(memory_fd)

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process is not None
        return self._process.pid

    def usable(self) -> bool:
        """Whether it lives and has said nothing unasked, which would be its last word."""
        assert self._process is not None
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        return self._process.poll() is None and not poller.poll(0)

    def share(self, regions: Regions) -> None:
        """Bring its maps up to date with ``regions``."""
        regions.tell(self._control, self._maps)

    def tell(self, op: Op, items: Sequence[Item]) -> None:
        """Send what is not replied to."""
        self._control.send(wire.request(op, items))

    def ask(self, op: Op, items: Sequence[Item], limit_s: float) -> list[Entry]:
        """The outcome of each item.

        Raises:
            TimeoutError: not done within ``limit_s``: `kill` it; `entries` says how far it came.
            HelperLost, OSError: it can't go on.
        """
        blank = Entry()
        for index in range(len(items)):
            wire.note(self._board, index, blank)
        if os.fstat(self._log).st_size > _LOG_LIMIT_BYTES:
            os.ftruncate(self._log, 0)
            os.lseek(self._log, 0, os.SEEK_SET)  # the helper's too: it is one open file
        self._control.settimeout(max(0.001, limit_s))
        self._control.send(wire.request(op, items))
        self._expect(Reply.DONE, limit_s)
        return self.entries(len(items))

    def entries(self, count: int) -> list[Entry]:
        """The board, of the last `ask`."""
        return wire.read_board(self._board, count)

    def kill(self) -> bool:
        """SIGKILL; whether it is gone for certain within `KILL_GRACE_S`."""
        assert self._process is not None
        self._process.kill()
        try:
            self._process.wait(KILL_GRACE_S)
        except subprocess.TimeoutExpired:
            return False
        return True

    def when_gone(self, then: Callable[[], None]) -> None:
        """Call ``then`` once the killed process is gone, on a thread that waits for it."""
        process = self._process
        assert process is not None

        def wait() -> None:
            process.wait()
            then()

        threading.Thread(target=wait, name="infinistore-reaper", daemon=True).start()

    def last_words(self) -> str:
        """The end of what it printed, as one line."""
        size = os.fstat(self._log).st_size
        text = os.pread(self._log, 600, max(0, size - 600)).decode(errors="replace")
        return " | ".join(line.strip() for line in text.splitlines() if line.strip())[-400:]

    def end(self, *, kill: bool = False) -> None:
        """Hang up, wait for its end (or kill it) and let go of its memory."""
        self._control.close()
        if self._process is not None:
            if kill:
                self._process.kill()
            try:
                self._process.wait(KILL_GRACE_S if kill else END_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self.when_gone(lambda: None)
        if self._log >= 0:
            os.close(self._log)
            self._log = -1
        for view in ("_board", "bounce"):
            if hasattr(self, view):
                getattr(self, view).release()
        if hasattr(self, "_memory"):
            self._memory.close()

    def _expect(self, reply: Reply, limit_s: float) -> None:
        self._control.settimeout(max(0.001, limit_s))
        said = self._control.recv(_REPLY_BYTES)
        if said and said[0] == reply:
            return
        text = said[1:].decode(errors="replace")
        if not said:
            assert self._process is not None
            try:
                code = self._process.wait(KILL_GRACE_S)
            except subprocess.TimeoutExpired:
                code = 0
            text = f"the helper ended with {code}: {self.last_words()}"
        raise HelperLost(text, setup=bool(said) and said[0] == Reply.BROKEN)
