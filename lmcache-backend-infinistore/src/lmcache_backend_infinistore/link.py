"""The native client, in the helper's process only: connections, and memory that both sides map."""

from __future__ import annotations

import asyncio
import mmap
import os
import select
import socket
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from lmcache_backend_infinistore import reading, writing
from lmcache_backend_infinistore.reading import Lost

_LINGER_NONE = struct.pack("ii", 1, 0)
_HASH_ASIDE_BYTES = 4 << 20
"""From here on a second thread is worth its wake-up."""


class Absent(Exception):
    """There is no such name."""


class NoRoom(Exception):
    """The server has no room for a value, and has hung up; `TcpLink.connect` again."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """Memory that the connector shares; ``array`` is all of it."""

    memory: mmap.mmap
    array: NDArray[np.uint8]

    @classmethod
    def of(cls, fd: int, nbytes: int) -> Mapped:
        """Map ``fd``, which stays the caller's."""
        memory = mmap.mmap(fd, nbytes)
        return cls(memory, np.frombuffer(memory, np.uint8))

    @property
    def address(self) -> int:
        """Of the first byte."""
        return int(self.array.ctypes.data)


class TcpLink:
    """One connection; heads and payloads go over TCP.

    Args:
        api: the module ``infinistore``.
        settings: see `lmcache_backend_infinistore.supervisor.Settings`.
    """

    _TYPE = "TYPE_TCP"

    def __init__(self, api: Any, settings: dict[str, Any]) -> None:
        self._api = api
        self._settings = settings
        self._connection: Any = None
        self.socket: socket.socket | None = None
        self._second: socket.socket | None = None

    def connect(self) -> None:
        """Connect anew.

        Raises:
            Lost: the server can't be reached.
        """
        if self._connection is not None:
            self._connection.close()
        if self.socket is not None:
            self.socket.close()
        if self._second is not None:
            self._second.close()
            self._second = None
        given = self._settings
        config = self._api.ClientConfig(
            host_addr=given["host"],
            service_port=given["port"],
            connection_type=getattr(self._api, self._TYPE),
            dev_name=given["rdma_device"],
            link_type=given["link_type"],
            ib_port=given["ib_port"],
            log_level="error",
        )
        self._connection = self._api.InfinityConnection(config)
        try:
            self._connection.connect()
        except Exception as error:
            raise Lost(str(error)) from error
        self.socket = _socket_to(given["host"], given["port"])
        # What is unsent when this process dies is thrown away: half a head would kill the server.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def share(self, mapped: Mapped) -> None:
        """Make ``mapped`` known; nothing to do over TCP."""

    def unshare(self, mapped: Mapped) -> None:
        """Undo `share`."""

    def stale(self) -> bool:
        """Whether the server has hung up; to be asked between requests only."""
        assert self.socket is not None
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        return bool(poller.poll(0))

    def exists(self, name: str) -> bool:
        """Whether ``name`` is there, perhaps without its bytes."""
        return bool(self._do(self._connection.check_exist, name))

    def read(self, name: str) -> bytes | None:
        """All bytes of ``name``, which are few; None when it is absent."""
        assert self.socket is not None
        nbytes = reading.ask(self.socket, name)
        if nbytes is None:
            return None
        content = bytearray(nbytes)
        reading.receive(self.socket, memoryview(content))
        return bytes(content)

    def write(self, name: str, content: bytes) -> None:
        """Store a few bytes.

        Raises:
            NoRoom: nothing is stored.
        """
        assert self.socket is not None
        if not writing.store(self.socket, name, content):
            raise NoRoom(name)

    def delete(self, names: Sequence[str]) -> None:
        """Remove ``names``, whose puts must have been acknowledged; absent ones are fine."""
        self._do(self._connection.delete_keys, list(names))

    def write_payload(
        self, name: str, mapped: Mapped, offset: int, nbytes: int, other: str
    ) -> tuple[int, bool]:
        """Store ``nbytes`` from ``offset`` of ``mapped`` on.

        Returns:
            Their xxh3_64, and whether the name ``other`` was there before.

        Raises:
            NoRoom: nothing is stored.
        """
        assert self.socket is not None
        checksum = xxhash.xxh3_64()
        source = mapped.array[offset : offset + nbytes].data
        try:
            room, there = writing.store_payload(self.socket, name, source, checksum.update, other)
        except Lost as error:
            # Perhaps it has refused, and was gone before we heard so: then there is no name.
            self.connect()
            if not self.exists(name):
                raise NoRoom(name) from error
            raise
        if not room:
            raise NoRoom(name)
        return checksum.intdigest(), there

    def read_payload(self, name: str, mapped: Mapped, offset: int, nbytes: int) -> int | None:
        """Fill ``mapped`` from ``offset`` on; its xxh3_64, or None when the size is another.

        Raises:
            Absent: there is no such name.
        """
        assert self.socket is not None
        found = reading.ask(self.socket, name)
        if found is None:
            raise Absent(name)
        checksum = xxhash.xxh3_64()
        if found != nbytes:
            reading.skip(self.socket, found)
        else:
            target = mapped.array[offset : offset + nbytes].data
            reading.receive(self.socket, target, checksum.update)
        if found > reading.LONG_BYTES:
            reading.settle(self._second_socket())
        return checksum.intdigest() if found == nbytes else None

    def _second_socket(self) -> socket.socket:
        if self._second is None:
            try:
                given = self._settings
                self._second = socket.create_connection((given["host"], given["port"]))
            except OSError as error:
                raise Lost(f"a second connection can't be made: {error}") from error
            self._second.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._second

    def _do(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # the library raises nothing finer
            raise Lost(str(error)) from error


class RdmaLink(TcpLink):
    """Payloads go by RDMA, straight between the server and mapped memory; heads over TCP."""

    _TYPE = "TYPE_RDMA"

    def __init__(self, api: Any, settings: dict[str, Any]) -> None:
        super().__init__(api, settings)
        self._loop = asyncio.new_event_loop()
        self._shared: list[Mapped] = []
        self._aside = ThreadPoolExecutor(1)

    def connect(self) -> None:
        super().connect()
        for mapped in self._shared:
            self._do(self._connection.register_mr, mapped.address, len(mapped.array))

    def share(self, mapped: Mapped) -> None:
        """Register ``mapped`` with the device."""
        self._shared.append(mapped)
        self._do(self._connection.register_mr, mapped.address, len(mapped.array))

    def unshare(self, mapped: Mapped) -> None:
        """Connect anew without ``mapped``: the library can't take back one registration."""
        self._shared = [each for each in self._shared if each is not mapped]
        self.connect()

    def write_payload(
        self, name: str, mapped: Mapped, offset: int, nbytes: int, other: str
    ) -> tuple[int, bool]:
        there = self.exists(other)
        checksum = self._checksum(mapped.array[offset : offset + nbytes].data)
        write = self._connection.rdma_write_cache_async
        try:
            self._loop.run_until_complete(write([(name, offset)], nbytes, mapped.address))
        except Exception as error:
            if str(error).endswith("507"):
                raise NoRoom(name) from error
            raise Lost(str(error)) from error
        return checksum(), there

    def read_payload(self, name: str, mapped: Mapped, offset: int, nbytes: int) -> int | None:
        read = self._connection.rdma_read_cache_async
        try:
            self._loop.run_until_complete(read([(name, offset)], nbytes, mapped.address))
        except self._api.InfiniStoreKeyNotFound as error:
            raise Absent(name) from error
        except Exception as error:
            raise Lost(str(error)) from error
        return xxhash.xxh3_64_intdigest(mapped.array[offset : offset + nbytes].data)

    def _checksum(self, source: memoryview) -> Callable[[], int]:
        """Of a buffer; a large one's is computed while its bytes are sent."""
        if len(source) < _HASH_ASIDE_BYTES:
            checksum = xxhash.xxh3_64_intdigest(source)
            return lambda: checksum
        return self._aside.submit(xxhash.xxh3_64_intdigest, source).result


def _socket_to(host: str, port: int) -> socket.socket:
    """A descriptor of our own for the library's connection, which it does not show."""
    for name in os.listdir("/proc/self/fd"):
        try:
            found = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # no socket, or the directory's own descriptor
        try:
            if found.getpeername()[:2] == (host, port):
                return found
        except OSError:
            pass  # not connected
        found.close()
    raise Lost("the connection broke off at once")
