"""`Regions`: device memory that is registered with cuFile once, not at each transfer."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lmcache_backend_gds.movers import DeviceArray
from lmcache_core.sdk import Counter, MemoryKind, Region

_CLOSE_LIMIT_S = 2.0


class Regions:
    """Thread-safe.  Host regions need no registration and are passed over.

    Args:
        register, deregister: `kvikio.memory_register` and its opposite.
        failed: counts regions that could not be registered; they work, only slower.
    """

    def __init__(
        self,
        register: Callable[[object], None],
        deregister: Callable[[object], None],
        failed: Counter,
    ) -> None:
        self._register = register
        self._deregister = deregister
        self._failed = failed
        self._lock = threading.Lock()
        self._held: dict[int, DeviceArray] = {}

    def add(self, region: Region) -> None:
        """Register a device region; one that is registered already is passed over."""
        if region.memory is not MemoryKind.DEVICE:
            return
        with self._lock:
            if region.region_id in self._held:
                return
            array = DeviceArray(region.address, region.nbytes)
            try:
                self._register(array)
            except RuntimeError:
                self._failed.inc()
                return
            self._held[region.region_id] = array

    def remove(self, region: Region) -> None:
        """Undo `add`."""
        with self._lock:
            array = self._held.pop(region.region_id, None)
            if array is not None:
                self._drop(array)

    def close(self) -> None:
        """Undo every `add`, on a daemon thread that is waited for 2 s at most."""
        if self._held:
            thread = threading.Thread(target=self._drop_all, name="gds-close", daemon=True)
            thread.start()
            thread.join(_CLOSE_LIMIT_S)

    def _drop_all(self) -> None:
        with self._lock:
            while self._held:
                self._drop(self._held.popitem()[1])

    def _drop(self, array: DeviceArray) -> None:
        try:
            self._deregister(array)
        except RuntimeError:
            self._failed.inc()
