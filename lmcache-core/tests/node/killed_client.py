"""Clients that a test kills.  Each runs in a process of its own, forked by `spawn`."""

from __future__ import annotations

import os
import pickle
import random
import signal
import socket
import time
from collections.abc import Callable
from typing import NoReturn

import numpy as np
from node_support import LAYOUT, client_config, content, keys_of

from lmcache_core.cache import ArenaHandle, Attached, Refusal, Slot, Wanted
from lmcache_core.envelope import HEADER_BYTES
from lmcache_core.memory.arena import ArenaError
from lmcache_core.node import protocol
from lmcache_core.node.client import NodeCache, connect

PREFIXES, LENGTH = 8, 4
POINTS = ("reserved", "half written", "written", "commit queued", "committed", "reading",
          "half a frame", "aborted", "any time")  # fmt: skip


def spawn(run: Callable[[], None]) -> int:
    """Run ``run`` in a child; its pid.  The child never returns into the test."""
    pid = os.fork()
    if pid:
        return pid
    _run_and_exit(run)


def _run_and_exit(run: Callable[[], None]) -> NoReturn:
    try:
        run()
    except BaseException as error:
        os.write(2, f"client: {error!r}\n".encode())
        os._exit(3)
    os._exit(0)


def kill(pid: int) -> None:
    """SIGKILL, and wait for the end."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the client ended by itself"


def live(address: str, seed: int) -> None:
    """Store and load until the point at which ``seed`` says that it dies."""
    rng = random.Random(seed)
    point, after = POINTS[seed % len(POINTS)], rng.randrange(4)
    cache = connect(client_config(address), [LAYOUT])
    attached = cache.handle.attach(warn=print, prefault=False)
    for turn in range(1_000_000):
        dying = turn == after
        _turn(cache, attached, rng, point if dying else "")
        if dying and point != "any time":
            os.kill(os.getpid(), signal.SIGKILL)


def _turn(cache: NodeCache, attached: Attached, rng: random.Random, point: str) -> None:
    keys = keys_of(f"prefix {rng.randrange(PREFIXES)}", LENGTH)
    ticket = cache.prefetch(keys)
    while not ticket.done:
        cache.wait(0.05)
        cache.poll()
    for key, slot in zip(keys, ticket.hits()):
        assert np.array_equal(_payload(attached, slot), content(key)), "wrong bytes"
    if point == "reading":
        return
    cache.release(ticket)
    if rng.random() < 0.3:
        cache.forget(keys[rng.randrange(LENGTH) :])
    parents = [None, *keys]
    given = cache.reserve([Wanted(k, p) for k, p in zip(keys, parents)])
    slots = [slot for slot in given if not isinstance(slot, Refusal)]
    if point == "reserved":
        return
    for slot in slots:
        payload, right = _payload(attached, slot), content(slot.key)
        payload[: len(right) // 2] = right[: len(right) // 2]
        if point == "half written":
            return
        payload[:] = right
    if point == "written":
        return
    if point == "aborted":
        cache.abort(slots)
    elif point == "half a frame":
        frame = protocol.frame(protocol.Commit(protocol.pack_offsets(s.offset for s in slots)))
        os.write(_socket_fd(cache), frame[:-3])
        return
    else:
        cache.commit(slots)
    if point != "commit queued":
        cache.poll()


def scheduler(address: str, worker: socket.socket) -> None:
    """Reserve, have the worker write, commit, again and again."""
    cache = connect(client_config(address), [LAYOUT])
    handle = cache.handle
    number = 0
    while True:
        keys = keys_of(f"prefix {number % PREFIXES}", LENGTH)
        number += 1
        cache.forget(keys)
        given = cache.reserve([Wanted(k, p) for k, p in zip(keys, [None, *keys])])
        slots = [slot for slot in given if not isinstance(slot, Refusal)]
        try:
            worker.sendall(_packed((handle, [(slot.key, slot.offset) for slot in slots])))
            written = worker.recv(1)
        except OSError:
            written = b""
        if not written:
            time.sleep(3600)
        cache.commit(slots)
        cache.poll()


def worker(scheduler: socket.socket) -> None:
    """Write what it is told, slowly; it goes on until it is killed."""
    try:
        _work(scheduler)
    except (OSError, EOFError, ArenaError):
        # The scheduler is dead, perhaps before this process could join its session.
        time.sleep(3600)


def _work(scheduler: socket.socket) -> None:
    attached: Attached | None = None
    while True:
        nbytes = int.from_bytes(scheduler.recv(4, socket.MSG_WAITALL), "little")
        order: tuple[ArenaHandle, list[tuple[bytes, int]]]
        order = pickle.loads(scheduler.recv(nbytes, socket.MSG_WAITALL))
        handle, slots = order
        if attached is None:
            attached = handle.attach(warn=print, prefault=False)
        for key, offset in slots:
            start, right = offset + HEADER_BYTES, content(key)
            payload = attached.arena.array[start : start + LAYOUT.payload_bytes]
            for piece in range(0, len(right), 3000):
                payload[piece : piece + 3000] = right[piece : piece + 3000]
                time.sleep(0.0005)
        scheduler.sendall(b"1")


def _packed(order: object) -> bytes:
    body = pickle.dumps(order)
    return len(body).to_bytes(4, "little") + body


def _payload(attached: Attached, slot: Slot) -> np.ndarray:
    start = slot.offset + HEADER_BYTES
    return attached.arena.array[start : start + LAYOUT.payload_bytes]


def _socket_fd(cache: NodeCache) -> int:
    assert cache._current is not None
    return cache._current.link._sock.fileno()
