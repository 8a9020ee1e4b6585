"""`BaseConnector`: what every connector must refuse, and how it closes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

from lmcache_core.sdk.buffers import Buffer
from lmcache_core.sdk.connector import MAX_KEY_BYTES, RemoteConnector
from lmcache_core.sdk.errors import BackendClosed, ContractViolation


class BaseConnector(RemoteConnector):
    """For connectors that answer a whole batch by themselves; others take `BatchLoop`.

    Each method starts with `check_call`; `close_resources` is called once.

    Args:
        name: of the backend, for errors.
        clock: of `OpContext.deadline_s`.
    """

    def __init__(self, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._pid = os.getpid()
        self._closed = False
        self._close_lock = threading.Lock()

    def close_resources(self) -> None:
        """Release what the connector holds; called once."""

    def close(self) -> None:
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
        if os.getpid() == self._pid:
            self.close_resources()

    def usable_view(self, buffer: Buffer) -> memoryview | None:
        """The buffer's bytes, or None when it is REJECTED: on a device, or misaligned."""
        alignment = self.capabilities.alignment
        if buffer.view is None or buffer.address % alignment or buffer.nbytes % alignment:
            return None
        return buffer.view

    def check_call(
        self, keys: Sequence[bytes], op: str, buffers: Sequence[Buffer] | None = None
    ) -> None:
        """What every method must refuse before it touches anything; for subclasses that
        answer a whole batch at once.

        Raises:
            BackendClosed: after close, or in a forked child.
            ContractViolation: over ``max_batch``, a key of a wrong length, not one buffer a key,
                overlapping targets.
        """
        if self._closed or os.getpid() != self._pid:
            why = "closed" if self._closed else "opened in another process"
            raise BackendClosed(
                f"the connector was {why}", backend=self._name, op=op, hint="open it again"
            )
        if len(keys) > self.capabilities.max_batch:
            raise ContractViolation(
                f"{len(keys)} keys in one call, max_batch is {self.capabilities.max_batch}",
                backend=self._name,
                op=op,
                hint="split the batch",
            )
        if buffers is not None and len(buffers) != len(keys):
            raise ContractViolation(
                f"{len(keys)} keys but {len(buffers)} buffers", backend=self._name, op=op
            )
        if op == "get_into":
            _refuse_overlap(buffers or (), self._name)
        for key in keys:
            if not 1 <= len(key) <= MAX_KEY_BYTES:
                raise ContractViolation(
                    f"a key of {len(key)} bytes, allowed are 1 to {MAX_KEY_BYTES}",
                    backend=self._name,
                    op=op,
                )


def _refuse_overlap(targets: Sequence[Buffer], backend: str) -> None:
    spans = sorted((t.address, t.address + t.nbytes) for t in targets)
    for (_, end), (start, _) in pairwise(spans):
        if start < end:
            raise ContractViolation("targets overlap", backend=backend, op="get_into")
