"""The other side of `Child`: one JSON line a request on stdin, one an answer on stdout.

A request names ``op`` and its arguments; ``arm`` in it arms the shim just around the connector's
call.  Every answer of an operation has ``status`` or ``error`` (an exception's type), and
``seconds``.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lmcache_conformance import shim
from lmcache_conformance.child import digest
from lmcache_conformance.memory import Memory, value
from lmcache_conformance.rig import Host, entry_points_of, within
from lmcache_core import plugins
from lmcache_core.sdk import LMCacheError, RemoteConnector

_LEFT = 0x5C
"""What memory is filled with once it is core's again."""


class Server:
    """Answers requests; one connector."""

    def __init__(self) -> None:
        self._store: RemoteConnector | None = None
        self._host = Host(Path(tempfile.gettempdir()))
        path = os.environ.get("LMC_SHIM")
        self._control = shim.Control(Path(path)) if path else None
        self._kept: list[Memory] = []
        self._taken: list[int] = []

    def answer(self, op: str, request: dict[str, Any]) -> dict[str, Any]:
        """Do it; an exception becomes ``error`` and ``message``."""
        arm = request.pop("arm", None)
        started_s = time.monotonic()
        try:
            found: dict[str, Any] = getattr(self, f"do_{op}")(arm=arm, **request)
        except Exception as error:  # the check judges it
            known = isinstance(error, LMCacheError)
            found = {"error": type(error).__name__, "message": str(error), "known": known}
        found.setdefault("seconds", time.monotonic() - started_s)
        if arm is not None and self._control is not None:
            found["seen"] = self._control.seen()
            found["fired"] = self._control.fired
        return found

    def do_open(self, *, arm: Any, url: str, module: str) -> dict[str, Any]:
        points = entry_points_of(url, module)
        with self._armed(arm):
            self._store = plugins.open_connector(url, self._host.services, points)
        return {"pid": os.getpid()}

    def do_put(
        self,
        *,
        arm: Any,
        key: str,
        seed: int,
        nbytes: int,
        seconds: float = 10,
        guard: bool = False,
    ) -> dict[str, Any]:
        memory = Memory.of([value(seed, nbytes)])
        if guard:
            memory.forbid(reading=False)
        context = within(seconds)
        with self._armed(arm) as took:
            answers = self.store.put_from(
                [bytes.fromhex(key)], memory.buffers(read_only=True), context
            )
        if guard:
            memory.forbid()
            self._kept.append(memory)
        return {"status": answers[0].name, "seconds": took()}

    def do_get(
        self, *, arm: Any, key: str, nbytes: int, seconds: float = 10, guard: bool = False,
        watch_s: float = 0.0,
    ) -> dict[str, Any]:  # fmt: skip
        """With ``watch_s`` the target is filled once it is core's again, and watched so long:
        ``late`` says whether anything wrote to it after."""
        memory = Memory([nbytes])
        buffers = memory.buffers(first_token=1)
        context = within(seconds)
        with self._armed(arm) as took:
            result = self.store.get_into([bytes.fromhex(key)], buffers, context)[0]
        found: dict[str, Any] = {
            "status": result.status.name,
            "nbytes": result.nbytes,
            "canaries": memory.canaries_intact(),
            "seconds": took(),
        }
        if result.status.name == "OK":
            found["digest"] = digest(memory.bytes_of(0, result.nbytes))
        if watch_s:
            found.update(self._watch(memory, nbytes, watch_s, result.status.name == "ABANDONED"))
        if guard:
            del buffers
            memory.forbid()
        self._kept.append(memory)
        return found

    def do_exists(self, *, arm: Any, key: str, seconds: float = 10) -> dict[str, Any]:
        context = within(seconds)
        with self._armed(arm) as took:
            answers = self.store.exists([bytes.fromhex(key)], context)
        return {"status": answers[0].name, "seconds": took()}

    def do_delete(self, *, arm: Any, key: str, seconds: float = 10) -> dict[str, Any]:
        context = within(seconds)
        with self._armed(arm) as took:
            answers = self.store.delete([bytes.fromhex(key)], context)
        return {"status": answers[0].name, "seconds": took()}

    def do_health(self, *, arm: Any, seconds: float = 10) -> dict[str, Any]:
        context = within(seconds)
        with self._armed(arm) as took:
            health = self.store.health(context)
        return {"status": "OK" if health.ok else "FAILED", "seconds": took()}

    def do_close(self, *, arm: Any) -> dict[str, Any]:
        with self._armed(arm) as took:
            self.store.close()
        return {"status": "OK", "seconds": took()}

    def do_exit(self, *, arm: Any) -> dict[str, Any]:
        """End as a program does, with everything that runs at exit."""
        sys.stdout.close()
        sys.exit(0)

    def do_take_files(self, *, arm: Any) -> dict[str, Any]:
        """Leave no file descriptor free."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            while True:
                self._taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            return {"status": "OK"}

    def do_give_files(self, *, arm: Any) -> dict[str, Any]:
        """Undo `do_take_files`."""
        while self._taken:
            os.close(self._taken.pop())
        return {"status": "OK"}

    def do_peak(self, *, arm: Any, key: str, nbytes: int, put: bool) -> dict[str, Any]:
        """Host memory that one transfer takes beside the value's own, at its peak."""
        memory = Memory.of([value(1, nbytes)]) if put else Memory([nbytes])
        buffers = memory.buffers(read_only=put)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_kib("VmRSS")
        if put:
            self.store.put_from([bytes.fromhex(key)], buffers, within(60))
        else:
            self.store.get_into([bytes.fromhex(key)], buffers, within(60))
        return {"status": "OK", "extra_bytes": (_status_kib("VmHWM") - before) * 1024}

    @property
    def store(self) -> RemoteConnector:
        """The connector."""
        assert self._store is not None
        return self._store

    def _watch(
        self, memory: Memory, nbytes: int, watch_s: float, abandoned: bool
    ) -> dict[str, Any]:
        end_s = time.monotonic() + watch_s
        released = not abandoned
        while not released and time.monotonic() < end_s:
            released = bool(self._host.released)
            time.sleep(0.01)
        if not released:
            return {"late": False, "released": False}
        memory.fill(0, bytes([_LEFT]) * nbytes)
        while time.monotonic() < end_s:
            time.sleep(0.02)
        left = np.frombuffer(memory.bytes_of(0), np.uint8)
        return {"late": bool((left != _LEFT).any()), "released": True}

    @contextlib.contextmanager
    def _armed(self, arm: dict[str, Any] | None) -> Iterator[Callable[[], float]]:
        """The shim acts within; gives how long that took."""
        ended: list[float] = []
        if arm is not None and self._control is not None:
            self._control.arm(
                shim.Action(arm.get("action", 0)),
                **{name: arm[name] for name in ("at", "error", "mask", "stall_ms") if name in arm},
            )
        started_s = time.monotonic()
        try:
            yield lambda: ended[0]
        finally:
            ended.append(time.monotonic() - started_s)
            if self._control is not None:
                self._control.disarm()


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise LookupError(field)


def main() -> None:
    """Answer until the requests end."""
    server = Server()
    answers = os.fdopen(os.dup(1), "w")
    # What a backend prints must not mix with the answers.
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        print(json.dumps(server.answer(request.pop("op"), request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
