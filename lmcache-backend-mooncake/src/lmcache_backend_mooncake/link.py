"""`Link`: one helper process, and the lanes to it."""

from __future__ import annotations

import collections
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

from lmcache_backend_mooncake.helper import MAX_MESSAGE
from lmcache_backend_mooncake.library import hint_of
from lmcache_backend_mooncake.settings import Settings
from lmcache_core.sdk import BackendUnavailable, ConfigError

_BROKEN = (BrokenPipeError, ConnectionResetError)


class Late(Exception):
    """The call runs on, and may touch what it was lent, until its ``ended`` is called."""


class Link:
    """A helper process that has opened the store; thread-safe.

    Args:
        settings: for the helper.
        end_s: when it must have opened, on the monotonic clock.
        log: takes each line that the library prints.

    Raises:
        ConfigError: the library can't be loaded.
        BackendUnavailable: the store can't be opened, or not by ``end_s``.
    """

    def __init__(self, settings: Settings, end_s: float, log: Callable[[str], None]) -> None:
        self._settings = settings
        self._log = log
        self._free: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self._late = self._busy = 0
        self._lock = threading.Lock()
        self._dead = False
        self._tail: collections.deque[str] = collections.deque(maxlen=20)
        self._control = self._spawn()
        try:
            self._open(end_s)
        except BaseException:
            self.kill()
            raise

    @property
    def alive(self) -> bool:
        """Whether calls can be sent to it."""
        return not self._dead and self._process.poll() is None

    @property
    def late_calls(self) -> int:
        """Calls past their deadline that still run."""
        return self._late

    @property
    def pid(self) -> int:
        """Of the helper."""
        return self._process.pid

    def ask(
        self, request: dict[str, Any], end_s: float, ended: Callable[[], None] = lambda: None,
        fds: Sequence[int] = (),
    ) -> dict[str, Any]:  # fmt: skip
        """One request and its answer.

        Args:
            ended: called once, by another thread, when a call that was `Late` has ended.
            fds: one memfd at most; sent along.

        Raises:
            Late: no answer by ``end_s``.
            TimeoutError: not sent by ``end_s``.
            BackendUnavailable: too many calls hang, or the helper has died.  Nothing touches
                what was lent any more.
        """
        if self._late >= self._settings.max_late_calls:
            raise BackendUnavailable(
                f"{self._late} calls hang",
                backend="mooncake",
                hint="look at the master and at the processes that lend memory",
            )
        left_s = end_s - time.monotonic()
        try:
            lane = self._free.get(timeout=max(0.001, left_s))
        except queue.Empty:
            raise TimeoutError("every lane is busy") from None
        data = json.dumps({**request, "left_s": max(0.0, end_s - time.monotonic())}).encode()
        try:
            lane.settimeout(max(0.001, end_s - time.monotonic()))
            socket.send_fds(lane, [data], fds)
        except OSError as error:
            if isinstance(error, _BROKEN):
                raise self._died(lane) from error
            self._free.put(lane)
            raise
        return self._answer(lane, end_s, ended)

    def kill(self) -> None:
        """End it now; returns when it is gone."""
        with self._lock:
            self._dead = True
        self._process.kill()
        self._process.wait()
        self._control.close()
        while True:
            try:
                self._free.get_nowait().close()
            except queue.Empty:
                return

    def close(self, *, lends: bool, limit_s: float) -> None:
        """Let calls end and, when it lends memory, take that back from the store."""
        end_s = time.monotonic() + limit_s
        while self._busy and time.monotonic() < end_s - limit_s * 0.9:
            time.sleep(0.01)
        if lends and self.alive:
            try:
                self._control.send(b"{}")
                self._process.wait(max(0.0, end_s - time.monotonic()))
            except (OSError, subprocess.TimeoutExpired):
                self._log("the library did not close in time")
        self.kill()

    def _spawn(self) -> socket.socket:
        count = 1 + self._settings.max_concurrency + self._settings.max_late_calls
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
        theirs = [pair[1].fileno() for pair in pairs]
        listed = ",".join(map(str, theirs))
        environment = {"MC_STORE_CLIENT_SETUP_RETRIES": "3", **os.environ}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lmcache_backend_mooncake.helper", listed],
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
            )
        finally:
            for _, their in pairs:
                their.close()
        assert self._process.stderr is not None
        threading.Thread(
            target=self._read_log, args=(self._process.stderr,), name="mooncake-log", daemon=True
        ).start()
        for ours, _ in pairs[1:]:
            self._free.put(ours)
        return pairs[0][0]

    def _open(self, end_s: float) -> None:
        request = {"settings": self._settings.as_json(), "parent": os.getpid()}
        self._control.send(json.dumps(request).encode())
        self._control.settimeout(max(0.001, end_s - time.monotonic()))
        try:
            answer = json.loads(self._control.recv(MAX_MESSAGE) or b'{"error": "it ended"}')
        except TimeoutError:
            answer = {"error": "the store was not opened in time"}
        if "error" not in answer:
            return
        if answer.get("kind") == "import":
            hint = hint_of(answer["error"])
            raise ConfigError(answer["error"], backend="mooncake", op="open", hint=hint)
        for line in self._tail:
            self._log(line)
        raise BackendUnavailable(
            answer["error"],
            backend="mooncake",
            op="open",
            hint="is mooncake_master running there, and does it answer?",
        )

    def _answer(
        self, lane: socket.socket, end_s: float, ended: Callable[[], None]
    ) -> dict[str, Any]:
        with self._lock:
            self._busy += 1
        try:
            lane.settimeout(max(0.001, end_s - time.monotonic()))
            data = lane.recv(MAX_MESSAGE)
        except OSError as error:
            if isinstance(error, _BROKEN):
                raise self._died(lane) from error
            with self._lock:
                self._late += 1
            threading.Thread(
                target=self._wait_late, args=(lane, ended), name="mooncake-late", daemon=True
            ).start()
            raise Late(f"no answer in time: {error}") from error
        finally:
            with self._lock:
                self._busy -= 1
        if not data:
            raise self._died(lane)
        self._give_back(lane)
        answer: dict[str, Any] = json.loads(data)
        if "error" in answer:
            raise OSError(answer["error"])
        return answer

    def _wait_late(self, lane: socket.socket, ended: Callable[[], None]) -> None:
        try:
            lane.settimeout(self._settings.stuck_after_s)
            data = lane.recv(MAX_MESSAGE)
        except OSError as error:
            self._log(f"a call hangs ({error}); its process is ended")
            data = b""
        if data:
            self._give_back(lane)
        else:
            lane.close()
            self.kill()
        with self._lock:
            self._late -= 1
        ended()

    def _give_back(self, lane: socket.socket) -> None:
        self._free.put(lane)
        if self._dead:
            self.kill()

    def _died(self, lane: socket.socket) -> BackendUnavailable:
        lane.close()
        self.kill()
        for line in self._tail:
            self._log(line)
        return BackendUnavailable(
            f"the helper process ended with {self._process.returncode}",
            backend="mooncake",
            hint="a new one starts with the next call; what the library said is in the log",
        )

    def _read_log(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self._tail.append(line.decode(errors="replace").rstrip())
