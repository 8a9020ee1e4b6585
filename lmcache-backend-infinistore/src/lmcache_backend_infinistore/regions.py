"""Core's memory regions, and which helper has mapped which."""

from __future__ import annotations

import os
import socket
import threading

from lmcache_backend_infinistore import wire
from lmcache_backend_infinistore.wire import Op
from lmcache_core.sdk import Buffer, Region


class Regions:
    """Core's regions that helpers can map; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next_map = wire.OWN_MAP + 1
        self._known: dict[int, tuple[int, int, Region]] = {}

    def add(self, region: Region) -> None:
        """Let helpers map ``region``; one without a descriptor is served by bouncing."""
        if region.fd < 0:
            return
        fd = os.dup(region.fd)
        with self._lock:
            old = self._known.pop(region.region_id, None)
            self._known[region.region_id] = (self._next_map, fd, region)
            self._next_map += 1
        if old is not None:
            os.close(old[1])

    def remove(self, region: Region) -> None:
        """Forget ``region``; each helper unmaps it before its next call."""
        with self._lock:
            old = self._known.pop(region.region_id, None)
        if old is not None:
            os.close(old[1])

    def place(self, buffer: Buffer) -> tuple[int, int] | None:
        """Map and offset of ``buffer``, or None when it lies in no mapped region."""
        if buffer.region is None:
            return None
        with self._lock:
            found = self._known.get(buffer.region.region_id)
        if found is None:
            return None
        map_id, _, region = found
        offset = buffer.address - region.address
        inside = offset >= 0 and offset + buffer.nbytes <= region.nbytes
        return (map_id, offset) if inside else None

    def tell(self, control: socket.socket, maps: dict[int, object]) -> None:
        """Send a helper, which has ``maps``, what it lacks and what is gone."""
        with self._lock:
            due = {map_id: (fd, region) for map_id, fd, region in self._known.values()}
            for map_id in [each for each in maps if each not in due]:
                control.send(wire.map_request(Op.UNMAP, map_id, 0))
                del maps[map_id]
            for map_id, (fd, region) in due.items():
                if map_id not in maps:
                    message = wire.map_request(Op.MAP, map_id, region.nbytes)
                    socket.send_fds(control, [message], [fd])
                    maps[map_id] = region

    def close(self) -> None:
        """Forget all."""
        with self._lock:
            known, self._known = list(self._known.values()), {}
        for _, fd, _ in known:
            os.close(fd)
