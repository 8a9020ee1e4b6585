"""The helper process: Mooncake's client, and one thread a lane.

    python -m lmcache_backend_mooncake.helper FD,FD,...     # started by `link.Link` only

The library lives here and not in the engine's process because its ``setup`` and ``close`` hold the
interpreter's lock for seconds (90 s without a master), its listeners face every interface and
serve this process's memory, and a call that hangs ends with its process.

A lane is a socket with one request at a time, a JSON message each way; memory comes as a memfd.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from lmcache_backend_mooncake.calls import Calls

T = TypeVar("T")
MAX_MESSAGE = 1 << 17
ATTACHED = -1
"""As a region's id: the memfd that came with the message."""

Place = tuple[int, int, int]
"""Region id, offset, bytes."""


class Memory:
    """A memfd, mapped."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self._map = mmap.mmap(fd, nbytes)
        self.nbytes = nbytes
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def close(self) -> None:
        """Unmap it; nothing may use it any more."""
        self._map.close()


class Helper:
    """Answers requests; thread-safe.

    Args:
        store: an opened ``MooncakeDistributedStore``.
        calls: on that store.
        registers: whether the transport needs every buffer registered (RDMA).
    """

    def __init__(self, store: Any, calls: Calls, *, registers: bool) -> None:
        self._store, self._calls, self._registers = store, calls, registers
        self._regions: dict[int, Memory] = {}

    def answer(self, request: dict[str, Any], fd: int) -> dict[str, Any]:
        """One request; ``fd`` is the memfd that came with it, or -1."""
        op = request.pop("op")
        end_s = time.monotonic() + request.pop("left_s", 0.0)
        if op == "map":
            return self._map_region(fd, **request)
        if op == "unmap":
            return self._unmap_region(**request)
        if op not in ("get", "put"):
            return {"codes": getattr(self._calls, op)(end_s=end_s, **request)}
        attached = Memory(fd, request.pop("attached")) if fd >= 0 else None
        try:
            if attached is not None and self._registers:
                self._store.register_buffer(attached.address, attached.nbytes)
            places = [self._address(place, attached) for place in request["at"]]
            sizes = [size for _, _, size in request["at"]]
            if op == "put":
                return {"codes": self._calls.put(request["keys"], places, sizes, end_s)}
            codes, true_sizes = self._calls.get(request["keys"], places, sizes, end_s)
            return {"codes": codes, "sizes": true_sizes}
        finally:
            if attached is not None:
                if self._registers:
                    self._store.unregister_buffer(attached.address)
                attached.close()

    def _map_region(self, fd: int, region: int, nbytes: int) -> dict[str, Any]:
        memory = Memory(fd, nbytes)
        code = self._store.register_buffer(memory.address, nbytes)
        if code:
            memory.close()
        else:
            self._regions[region] = memory
        return {"codes": [code]}

    def _unmap_region(self, region: int) -> dict[str, Any]:
        memory = self._regions.pop(region, None)
        if memory is not None:
            self._store.unregister_buffer(memory.address)
            memory.close()
        return {"codes": [0]}

    def _address(self, place: Place, attached: Memory | None) -> int:
        region, offset, size = place
        memory = attached if region == ATTACHED else self._regions.get(region)
        if memory is None or offset < 0 or offset + size > memory.nbytes:
            raise ValueError(f"no memory at {offset} of region {region}")
        return memory.address + offset


def open_store(settings: dict[str, Any]) -> Helper:
    """
    Raises:
        ImportError: the library can't be loaded.
        ConnectionError: the master can't be reached, or does not take us.
    """
    from mooncake.store import MooncakeDistributedStore, ReplicateConfig, SoftPinAction

    host, port = settings["master"]
    config = ReplicateConfig()
    config.replica_num = settings["replicas"]
    config.with_hard_pin = settings["pin"] == "hard"
    if settings["pin"] == "soft":
        config.soft_pin_action = SoftPinAction.ENABLE
        config.soft_pin_ttl_ms = int(settings["soft_pin_ttl_s"] * 1000)
    store = MooncakeDistributedStore()
    code = store.setup(
        local_hostname=settings["local_hostname"] or facing(host, port),
        metadata_server=settings["metadata_server"],
        global_segment_size=settings["segment_bytes"],
        local_buffer_size=settings["local_buffer_bytes"],
        protocol=settings["protocol"],
        rdma_devices=settings["rdma_devices"],
        master_server_addr=f"{host}:{port}",
        enable_ssd_offload=bool(settings["ssd_offload_path"]),
        ssd_offload_path=settings["ssd_offload_path"],
    )
    if code:
        raise ConnectionError(f"Mooncake's setup answered {code}")
    calls = Calls(store, config, master=(host, port))
    return Helper(store, calls, registers=settings["protocol"] == "rdma")


def facing(host: str, port: int) -> str:
    """Our address on the network of the master; sends nothing."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        return str(sock.getsockname()[0])


def _serve(lane: socket.socket, helper: Helper) -> None:
    """Answer what comes over ``lane``; what can't be answered ends the process, not the lane."""
    try:
        while True:
            data, fds, _, _ = _twice(lambda: socket.recv_fds(lane, MAX_MESSAGE, 1))
            if not data:
                return
            try:
                reply = helper.answer(json.loads(data), fds[0] if fds else -1)
            except Exception as error:  # told to the caller
                reply = {"error": repr(error)}
            finally:
                for fd in fds:
                    os.close(fd)
            message = json.dumps(reply).encode()
            _twice(lambda: lane.send(message))  # noqa: B023
    except BaseException:
        os._exit(1)


def _twice(call: Callable[[], T]) -> T:
    """``call``, a second time when the system fails it once."""
    try:
        return call()
    except OSError:
        return call()


def _end_with(parent: int) -> None:
    """Leave when the process that we work for has ended, however it did."""
    if os.getppid() != parent:
        os._exit(1)
    fd = os.pidfd_open(parent)
    while not select.select([fd], [], [])[0]:
        pass
    os._exit(1)


def main() -> None:
    """Open, answer, close; see the module."""
    # A Ctrl-C of the engine's is not for us.  No session of our own: where the kernel shares out
    # the processors by session, a get in one took half as long again.
    os.setpgrp()
    control, *lanes = (socket.socket(fileno=int(fd)) for fd in sys.argv[1].split(","))
    request = json.loads(control.recv(MAX_MESSAGE))
    threading.Thread(target=_end_with, args=(request["parent"],), daemon=True).start()
    try:
        helper = open_store(request["settings"])
    except Exception as error:  # told to the caller
        kind = "import" if isinstance(error, ImportError) else "open"
        control.send(json.dumps({"error": str(error), "kind": kind}).encode())
        os._exit(1)
    for lane in lanes:
        threading.Thread(target=_serve, args=(lane, helper), daemon=True).start()
    control.send(b"{}")
    if control.recv(MAX_MESSAGE):
        helper._store.close()
    os._exit(0)


if __name__ == "__main__":
    main()
