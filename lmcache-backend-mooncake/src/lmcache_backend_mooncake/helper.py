"""The helper process: Mooncake's client, and one thread a lane.

    python -m lmcache_backend_mooncake.helper FD,FD,...     # started by `link.Link` only

The library lives here and not in the engine's process because its ``setup`` and ``close`` hold the
interpreter's lock for seconds (90 s without a master), its listeners face every interface and
serve this process's memory, and a call that hangs ends with its process.

A lane is a socket with one request at a time, a JSON message each way; memory comes as a memfd.
"""

from __future__ import annotations

import contextlib
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

from lmcache_backend_mooncake.codes import AWAY, Code

T = TypeVar("T")
MAX_MESSAGE = 1 << 17
ATTACHED = -1
"""As a region's id: the memfd that came with the message."""
_RETRY_AFTER_S = 0.02
_LISTENS_LIMIT_S = 0.5
_OTHERS_PUT_LIMIT_S = 0.2
_NO_KEY = "lmc-health"
_GIVES_WAY = 5
"""Niceness of a lane: who calls for a transfer spins in the library until its other threads have
moved the bytes, and on few cores keeps them from it."""
_AGAIN = frozenset({Code.TRANSFER_FAIL, Code.LEASE_EXPIRED})

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
        config: the ``ReplicateConfig`` of puts.
        master: host and port.
        registers: whether the transport needs every buffer registered (RDMA).
    """

    def __init__(
        self, store: Any, config: Any, *, master: tuple[str, int], registers: bool
    ) -> None:
        self._store, self._config = store, config
        self._master, self._registers = master, registers
        self._master_failed = False
        self._regions: dict[int, Memory] = {}
        self._putting: set[str] = set()
        self._lock = threading.Lock()

    def answer(self, request: dict[str, Any], fd: int) -> dict[str, Any]:
        """One request; ``fd`` is the memfd that came with it, or -1."""
        op = request.pop("op")
        end_s = time.monotonic() + request.pop("left_s", 0.0)
        if op == "map":
            return self._map_region(fd, **request)
        if op == "unmap":
            return self._unmap_region(**request)
        if op not in ("get", "put"):
            return {"codes": getattr(self, f"_{op}")(end_s=end_s, **request)}
        attached = Memory(fd, request.pop("attached")) if fd >= 0 else None
        try:
            if attached is not None and self._registers:
                self._store.register_buffer(attached.address, attached.nbytes)
            places = [self._address(place, attached) for place in request["at"]]
            sizes = [size for _, _, size in request["at"]]
            if op == "put":
                return {"codes": self._put(request["keys"], places, sizes, end_s)}
            return self._get(request["keys"], places, sizes, end_s)
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

    def _exists(self, keys: list[str], end_s: float) -> list[int]:
        return self._again(len(keys), lambda: self._store.batch_is_exist(keys), end_s)

    def _health(self, end_s: float) -> list[int]:
        # health_check() says 0 of a master that is dead.
        return self._exists([_NO_KEY], end_s)

    def _delete(self, keys: list[str], end_s: float) -> list[int]:
        # Each get, and each exists, takes a lease of seconds; force goes over it.
        return self._again(len(keys), lambda: self._store.batch_remove(keys, True), end_s)

    def _get(
        self, keys: list[str], at: list[int], sizes: list[int], end_s: float
    ) -> dict[str, Any]:
        codes = self._again(len(keys), lambda: self._store.batch_get_into(keys, at, sizes), end_s)
        broken = [i for i, code in enumerate(codes) if code in _AGAIN]
        if broken and time.monotonic() < end_s:
            # A kept connection to a lender that has broken is found by its next use.
            picked = [[each[i] for i in broken] for each in (keys, at, sizes)]
            for i, code in zip(broken, self._store.batch_get_into(*picked)):
                codes[i] = code
        read = [i for i, code in enumerate(codes) if code >= 0]
        if read:
            # A delete by force during the read gives the memory to others: then it is no value.
            still = self._exists([keys[i] for i in read], end_s)
            for i, there in zip(read, still):
                if there != 1:
                    codes[i] = Code.OBJECT_NOT_FOUND if there == 0 else there
        small = [i for i, code in enumerate(codes) if code == Code.INVALID_PARAMS]
        true_sizes = {i: int(self._store.get_size(keys[i])) for i in small}
        return {"codes": codes, "sizes": true_sizes}

    def _put(self, keys: list[str], at: list[int], sizes: list[int], end_s: float) -> list[int]:
        """A session and no ``batch_put_from``, which answers 0 for a key whose put began and
        never ended, though nothing can be read then."""
        with self._lock:
            ours = [key for key in keys if key not in self._putting]
            self._putting.update(ours)
        try:
            where = {key: (address, size) for key, address, size in zip(keys, at, sizes)}
            begun = self._begin(ours, [where[key][1] for key in ours], end_s)
            self._fill(begun, where, end_s)
            broken = [key for key, code in begun.items() if code == Code.TRANSFER_FAIL]
            if broken and time.monotonic() < end_s:
                # Over a new connection, or to another lender.
                again = self._begin(broken, [where[key][1] for key in broken], end_s)
                self._fill(again, where, end_s)
                begun.update(again)
        finally:
            with self._lock:
                self._putting.difference_update(ours)
        codes = [begun.get(key, int(Code.OBJECT_ALREADY_EXISTS)) for key in keys]
        self._await_others(keys, codes, end_s)
        return codes

    def _begin(self, keys: list[str], sizes: list[int], end_s: float) -> dict[str, int]:
        def start(names: list[str]) -> list[int]:
            wanted = [sizes[keys.index(name)] for name in names]
            return self._again(
                len(names),
                lambda: self._store.batch_put_session_start(names, wanted, self._config),
                end_s,
            )

        begun = dict(zip(keys, start(keys))) if keys else {}
        left = [key for key, code in begun.items() if code == Code.INVALID_PARAMS]
        if left:
            # A session that could not be ended: the master was away.
            self._store.batch_put_session_revoke(left)
            begun.update(zip(left, start(left)))
        return begun

    def _fill(self, begun: dict[str, int], where: dict[str, tuple[int, int]], end_s: float) -> None:
        """Move the bytes of what has begun and publish it; ``begun`` gets the codes."""
        keys = [key for key, code in begun.items() if code == Code.OK]
        if not keys:
            return
        moved = self._store.batch_put_from_multi_buffer_ranges(
            keys,
            [[where[key][0]] for key in keys],
            [[where[key][1]] for key in keys],
            [[0]] * len(keys),
        )
        whole = [key for key, nbytes in zip(keys, moved) if nbytes == where[key][1]]
        begun.update(
            (key, min(nbytes, int(Code.TRANSFER_FAIL)))
            for key, nbytes in zip(keys, moved)
            if nbytes != where[key][1]
        )
        if whole:
            ends = self._again(len(whole), lambda: self._store.batch_put_session_end(whole), end_s)
            begun.update(zip(whole, ends))
            doubtful = [key for key in whole if begun[key] != Code.OK]
            if doubtful:
                # Ended all the same, and only the answer was lost?
                for key, there in zip(doubtful, self._exists(doubtful, end_s)):
                    begun[key] = Code.OK if there == 1 else begun[key]
        failed = [key for key in keys if begun[key] != Code.OK]
        if failed:
            # An end here would publish what is not whole.
            self._store.batch_put_session_revoke(failed)

    def _await_others(self, keys: list[str], codes: list[int], end_s: float) -> None:
        """A key that another one is putting is there in a moment, or never."""
        end_s = min(end_s, time.monotonic() + _OTHERS_PUT_LIMIT_S)
        while True:
            others = [i for i, code in enumerate(codes) if code == Code.OBJECT_ALREADY_EXISTS]
            if not others:
                return
            for i, there in zip(others, self._exists([keys[i] for i in others], end_s)):
                if there:
                    codes[i] = Code.OK if there == 1 else there
            if time.monotonic() > end_s:
                return
            if Code.OBJECT_ALREADY_EXISTS in codes:
                time.sleep(0.005)

    def _again(self, count: int, call: Callable[[], list[int]], end_s: float) -> list[int]:
        """``call`` for ``count`` keys, a second time when its connection had died.

        The library takes 4 s to find that nothing listens; we ask first once it has failed.
        """
        for turn in range(2):
            if self._master_failed and not self._master_listens():
                return [int(Code.RPC_FAIL)] * count
            codes = list(call())
            self._master_failed = not AWAY.isdisjoint(codes)
            if not self._master_failed or turn or time.monotonic() + _RETRY_AFTER_S > end_s:
                break
            time.sleep(_RETRY_AFTER_S)
        return codes

    def _master_listens(self) -> bool:
        try:
            socket.create_connection(self._master, timeout=_LISTENS_LIMIT_S).close()
        except OSError:
            return False
        return True


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
    return Helper(store, config, master=(host, port), registers=settings["protocol"] == "rdma")


def facing(host: str, port: int) -> str:
    """Our address on the network of the master; sends nothing."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        return str(sock.getsockname()[0])


def _serve(lane: socket.socket, helper: Helper) -> None:
    """Answer what comes over ``lane``; what can't be answered ends the process, not the lane."""
    with contextlib.suppress(OSError):  # where it is not allowed, it is only slower
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _GIVES_WAY)
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
