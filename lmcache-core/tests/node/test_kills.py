"""kill -9 of clients at any point: no slot, no pin, no half-written chunk is left."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest
from killed_client import LENGTH, POINTS, PREFIXES, kill, live, scheduler, spawn, worker
from node_support import (
    SLOT_BYTES,
    Client,
    Server,
    assert_nothing_is_held,
    client,
    content,
    keys_of,
    serving,
    until,
)

from lmcache_core.cache import Refusal

KILLS = 200
KILLS_OF_TWO = 25


def assert_unharmed(server: Server, observer: Client) -> None:
    """The dead have left nothing, and every chunk is whole."""
    observer.cache.poll()
    until(lambda: len(server.status()["sessions"]) == 1, "the end of the dead session")
    for prefix in range(PREFIXES):
        observer.load(keys_of(f"prefix {prefix}", LENGTH))
    until(lambda: not server.status()["sessions"][0]["tickets"], "the end of the tickets")
    assert_nothing_is_held(server.status(), 1)


@pytest.mark.slow
def test_clients_killed_at_any_point_harm_nobody(tmp_path: Path) -> None:
    rng = random.Random(11)
    with serving(tmp_path, host_bytes=20 * SLOT_BYTES) as server, client(server.socket) as observer:
        observer.load(keys_of("prefix 0", LENGTH))
        for seed in range(KILLS):
            pid = spawn(partial(live, server.socket, seed))
            if POINTS[seed % len(POINTS)] == "any time":
                time.sleep(rng.uniform(0.0, 0.03))
                os.kill(pid, signal.SIGKILL)
            kill_at_latest(pid)
            assert_unharmed(server, observer)
        counters = server.status()["counters"]
        assert counters["node.reclaimed_slots"] > KILLS // 8
        assert counters["node.reclaimed_tickets"] > KILLS // 20
        assert counters["host.stored"] > KILLS
        assert counters.get("node.protocol_errors", 0) == 0


def kill_at_latest(pid: int, limit_s: float = 10.0) -> None:
    """Wait for a client that kills itself."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            assert os.WIFSIGNALED(status), "the client ended by itself"
            return
        time.sleep(0.001)
    kill(pid)
    pytest.fail("the client did not die in time")


@pytest.mark.slow
def test_a_worker_may_write_as_long_as_it_lives(tmp_path: Path) -> None:
    """Scheduler and worker are killed one after the other, in any order, at any time."""
    rng = random.Random(12)
    outlived = 0
    with serving(tmp_path, host_bytes=20 * SLOT_BYTES) as server, client(server.socket) as observer:
        observer.load(keys_of("prefix 0", LENGTH))
        for _ in range(KILLS_OF_TWO):
            ours, theirs = socket.socketpair()
            writer = spawn(lambda theirs=theirs, ours=ours: (ours.close(), worker(theirs)))  # type: ignore[misc]
            theirs.close()
            planner = spawn(partial(scheduler, server.socket, ours))
            ours.close()
            time.sleep(rng.uniform(0.03, 0.12))
            if rng.random() < 0.3:
                kill(writer)
                kill(planner)
            else:
                kill(planner)
                time.sleep(0.02)
                observer.cache.poll()
                sessions = server.status()["sessions"]
                # Joined by its worker, or never: then it ended with its scheduler.
                if len(sessions) == 2:
                    outlived += sessions[1]["slots"] > 0
                    assert sessions[1]["connections"] == 1
                kill(writer)
            assert_unharmed(server, observer)
        assert outlived > KILLS_OF_TWO // 5


def test_a_slot_stays_reserved_until_the_last_process_of_its_session_goes(tmp_path: Path) -> None:
    with serving(tmp_path) as server, client(server.socket) as observer:
        one = Client(server.socket)
        (slot,) = one.reserve(keys_of("a", 1))
        assert not isinstance(slot, Refusal)
        payload = one.payload(slot)
        payload[:100] = content(slot.key)[:100]
        one.cache.close()
        until(lambda: server.status()["sessions"][1]["connections"] == 1)
        assert server.status()["sessions"][1]["slots"] == 1
        assert observer.reserve(keys_of("a", 1)) == [Refusal.PRESENT]
        assert observer.load(keys_of("a", 1)) == 0
        payload[:] = 1
        one.detach()
        until(lambda: len(server.status()["sessions"]) == 1)
        assert observer.store(keys_of("a", 1)) == 1
        assert observer.load(keys_of("a", 1)) == 1
        assert server.counter("node.reclaimed_slots") == 1


def test_a_stopped_client_keeps_its_slot_and_may_go_on(tmp_path: Path) -> None:
    with serving(tmp_path) as server, client(server.socket) as observer:
        told, tell = socket.socketpair()

        def stopping() -> None:
            one = Client(server.socket)
            (slot,) = one.reserve(keys_of("a", 1))
            assert not isinstance(slot, Refusal)
            os.kill(os.getpid(), signal.SIGSTOP)
            one.payload(slot)[:] = content(slot.key)
            one.cache.commit([slot])
            one.cache.poll()
            tell.sendall(b"1")
            time.sleep(3600)

        pid = spawn(stopping)
        try:
            _, status = os.waitpid(pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            for number in range(20):
                observer.store(keys_of(f"more {number}", 10))
            assert observer.reserve(keys_of("a", 1)) == [Refusal.PRESENT]
            os.kill(pid, signal.SIGCONT)
            told.settimeout(10)
            assert told.recv(1)
            until(lambda: observer.load(keys_of("a", 1)) == 1)
        finally:
            kill(pid)
            told.close()
            tell.close()
