"""The process in which the native client runs: it may hang or crash there, and only there.

    python -m lmcache_backend_infinistore.helper DESCRIPTOR PARENT

Started by `Helper` (supervisor.py), which kills it at a call's deadline.  Ends with its parent.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from typing import Any

import xxhash

from lmcache_backend_infinistore import wire
from lmcache_backend_infinistore.layout import GONE, Head, head_name, payload_name
from lmcache_backend_infinistore.link import Absent, Mapped, NoRoom, RdmaLink, TcpLink
from lmcache_backend_infinistore.reading import Lost
from lmcache_backend_infinistore.wire import Code, Entry, Item, Op, Phase, Reply

HEAD_READS = 3
_PARENT_LOOK_S = 1.0
_NONE = bytes(12)
_CHECKSUM_OF_NOTHING = xxhash.xxh3_64_intdigest(b"")


class Server:
    """Answers requests, one at a time."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._maps: dict[int, Mapped] = {}
        message, fds = self._receive()
        self._settings: dict[str, Any] = json.loads(bytes(message[1:]))
        size = wire.BOARD_BYTES + int(self._settings["bounce_bytes"])
        self._maps[wire.OWN_MAP] = Mapped.of(fds[0], size)
        os.close(fds[0])
        self._board = memoryview(self._maps[wire.OWN_MAP].memory)[: wire.BOARD_BYTES]

    def run(self) -> None:
        """Connect, then answer until the connector hangs up."""
        try:
            self._link = self._connected()
            self._reply(Reply.READY)
            while self._answer_next():
                pass
        except Lost as error:
            self._reply(Reply.LOST, str(error))
        except ImportError as error:
            self._reply(Reply.BROKEN, str(error))

    def _connected(self) -> TcpLink:
        import infinistore

        rdma = self._settings["connection"] == "rdma"
        link = (RdmaLink if rdma else TcpLink)(infinistore, self._settings)
        link.connect()
        for mapped in self._maps.values():
            link.share(mapped)
        return link

    def _answer_next(self) -> bool:
        """Wait for a message and do it; False when there will be none."""
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        assert self._link.socket is not None
        poller.register(self._link.socket, select.POLLIN)
        poller.poll()
        if self._link.stale():
            self._link.connect()
            return True
        message, fds = self._receive()
        if not message:
            return False
        op = Op(message[0])
        if op is Op.MAP:
            map_id, nbytes = wire.map_of(message)
            self._maps[map_id] = Mapped.of(fds[0], nbytes)
            os.close(fds[0])
            self._link.share(self._maps[map_id])
        elif op is Op.UNMAP:
            self._link.unshare(self._maps.pop(wire.map_of(message)[0]))
        elif op is Op.DROP:
            self._link.delete([item.key.decode() for item in wire.items_of(message)])
        else:
            self._do(op, wire.items_of(message))
            self._reply(Reply.DONE)
        return True

    def _do(self, op: Op, items: list[Item]) -> None:
        one = {
            Op.EXISTS: self._exists,
            Op.GET: self._get,
            Op.PUT: self._put,
            Op.DELETE: self._delete,
            Op.SWEEP: self._sweep,
            Op.COVER: self._cover,
        }[op]
        for index, item in enumerate(items):
            wire.note(self._board, index, one(index, item))

    def _exists(self, index: int, item: Item) -> Entry:
        return Entry(Code.OK if self._link.exists(head_name(item.key)) else Code.MISS)

    def _get(self, index: int, item: Item) -> Entry:
        seen = b""
        for _ in range(HEAD_READS):
            data = self._link.read(head_name(item.key))
            if data is None or data == GONE:
                return Entry(Code.MISS)
            head = Head.decode(item.key, data)
            if head is None:
                return Entry(Code.CORRUPT)
            if head.nbytes > item.nbytes:
                return Entry(Code.SIZE_MISMATCH, nbytes=head.nbytes)
            if not head.nbytes:
                return Entry(Code.OK)
            name = payload_name(item.key, head.version)
            where = self._maps[item.map_id], item.offset, head.nbytes
            try:
                whole = self._link.read_payload(name, *where) == head.checksum
            except Absent:
                # Evicted; or replaced since the head was read, then there is another head now.
                if head.version == seen:
                    break
                seen = head.version
            else:
                return Entry(Code.OK, nbytes=head.nbytes) if whole else Entry(Code.CORRUPT)
        return Entry(Code.MISS)

    def _put(self, index: int, item: Item) -> Entry:
        checksum, there = _CHECKSUM_OF_NOTHING, True
        if item.nbytes:
            wire.note(self._board, index, Entry(phase=Phase.PAYLOAD))
            name = payload_name(item.key, item.version)
            where = self._maps[item.map_id], item.offset, item.nbytes
            try:
                checksum, there = self._link.write_payload(name, *where, head_name(item.key))
            except NoRoom:
                self._link.connect()
                return Entry(Code.REJECTED)
        old = self._version(item.key) if there else None
        head = Head(item.version, item.nbytes, checksum)
        try:
            wire.note(self._board, index, Entry(phase=Phase.HEAD))
            self._link.write(head_name(item.key), head.encode(item.key))
        except NoRoom:
            self._link.connect()
            return Entry(Code.REJECTED, Phase.PAYLOAD)
        return Entry(Code.OK, Phase.HEAD, old=old or _NONE)

    def _delete(self, index: int, item: Item) -> Entry:
        old = self._version(item.key)
        if old is not None:
            self._link.delete([head_name(item.key)])
        return Entry(Code.OK, old=old or _NONE)

    def _cover(self, index: int, item: Item) -> Entry:
        self._link.write(item.key.decode(), GONE)
        return Entry(Code.OK)

    def _sweep(self, index: int, item: Item) -> Entry:
        self._cover(index, item)
        self._link.delete([item.key.decode()])
        return Entry(Code.OK)

    def _version(self, key: bytes) -> bytes | None:
        """That of the value that is there, zeros when it has no payload; None without a head."""
        data = self._link.read(head_name(key))
        if data is None:
            return None
        head = Head.decode(key, data)
        return head.version if head and head.nbytes else _NONE

    def _receive(self) -> tuple[memoryview, list[int]]:
        message, fds, _, _ = socket.recv_fds(self._control, wire.MAX_MESSAGE_BYTES, 1)
        return memoryview(message), fds

    def _reply(self, reply: Reply, text: str = "") -> None:
        self._control.send(bytes([reply]) + text.encode()[:1000])


def _end_with(parent: int) -> None:
    """End this process when ``parent`` has; also when the library hangs."""
    while os.getppid() == parent:
        time.sleep(_PARENT_LOOK_S)
    os._exit(0)


def main() -> None:
    """See above."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        Server(socket.socket(fileno=descriptor)).run()
    except OSError as error:  # the connector has gone, or a system call failed: it will see
        print(f"the helper ends: {error!r}", file=sys.stderr)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
