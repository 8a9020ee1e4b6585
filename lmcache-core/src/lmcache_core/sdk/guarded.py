"""`GuardedLoop`: a connector over native calls that know no time-out.

Each call runs in a daemon thread on a bounce buffer of its own.  What comes back before
the deadline is copied to the target; what comes later is thrown away, so core's memory is
never touched late.  Calls that hang are bounded: at the limit the backend is unavailable.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from lmcache_core.sdk.batch import BatchLoop, TargetTooSmall
from lmcache_core.sdk.errors import BackendUnavailable

T = TypeVar("T")


class _Outcome(Generic[T]):
    __slots__ = ("done", "error", "value")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.value: T | None = None
        self.error: Exception | None = None


class GuardedLoop(BatchLoop):
    """Like `BatchLoop`; the subclass gives the ``native_*`` functions, which may block for ever.

    Args:
        name: of the backend.
        max_stuck: calls that may be running past their deadline before `BackendUnavailable`.
    """

    def __init__(self, name: str, *, max_stuck: int = 8) -> None:
        super().__init__(name)
        self._max_stuck = max_stuck
        self._stuck = 0
        self._stuck_lock = threading.Lock()

    @property
    def stuck_calls(self) -> int:
        """Native calls that are past their deadline and still run."""
        return self._stuck

    @abstractmethod
    def native_exists(self, key: bytes) -> bool:
        """Whether ``key`` is present."""

    @abstractmethod
    def native_get(self, key: bytes, target: memoryview) -> int | None:
        """Fill the start of ``target`` (memory of our own); size, or None when absent."""

    @abstractmethod
    def native_put(self, key: bytes, source: bytes) -> None:
        """Store ``source``, a copy of our own."""

    @abstractmethod
    def native_delete(self, key: bytes) -> None:
        """Remove ``key``; absent is fine."""

    def exists_one(self, key: bytes, timeout_s: float) -> bool:
        return self._guard(lambda: self.native_exists(key), timeout_s)

    def get_one(self, key: bytes, target: memoryview, timeout_s: float) -> int | None:
        bounce = bytearray(len(target))
        nbytes = self._guard(lambda: self.native_get(key, memoryview(bounce)), timeout_s)
        if nbytes is not None:
            if nbytes > len(target):
                raise TargetTooSmall(nbytes)
            target[:nbytes] = memoryview(bounce)[:nbytes]
        return nbytes

    def put_one(self, key: bytes, source: memoryview, timeout_s: float) -> None:
        copy = bytes(source)
        self._guard(lambda: self.native_put(key, copy), timeout_s)

    def delete_one(self, key: bytes, timeout_s: float) -> None:
        self._guard(lambda: self.native_delete(key), timeout_s)

    def _guard(self, call: Callable[[], T], timeout_s: float) -> T:
        """``call`` in a thread; TimeoutError past ``timeout_s``.

        Raises:
            BackendUnavailable: ``max_stuck`` calls already hang.
        """
        if self._stuck >= self._max_stuck:
            raise BackendUnavailable(
                f"{self._stuck} native calls hang",
                backend=self._name,
                hint="the store is frozen; restart it, or this process",
            )
        outcome: _Outcome[T] = _Outcome()

        def run() -> None:
            try:
                outcome.value = call()
            except Exception as error:  # handed to the caller below
                outcome.error = error
            with self._stuck_lock:
                late = outcome.done.is_set()
                outcome.done.set()
                if late:
                    self._stuck -= 1

        threading.Thread(target=run, name=f"{self._name}-native", daemon=True).start()
        if not outcome.done.wait(timeout_s):
            with self._stuck_lock:
                if not outcome.done.is_set():
                    outcome.done.set()
                    self._stuck += 1
                    raise TimeoutError(f"no answer within {timeout_s:.3f} s")
        if outcome.error is not None:
            raise outcome.error
        return outcome.value  # type: ignore[return-value]
