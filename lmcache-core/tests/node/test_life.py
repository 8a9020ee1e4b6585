"""A server starts, stops, freezes, dies and comes back; what its clients see of that."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from node_support import (
    LIMIT_S,
    SLOT_BYTES,
    Client,
    Server,
    client,
    content,
    keys_of,
    serving,
    until,
)
from typer.testing import CliRunner

from lmcache_core.cache import Refusal
from lmcache_core.cli.app import app
from lmcache_core.memory.arena import ArenaError
from lmcache_core.node.address import default_path
from lmcache_core.node.client import NODE_DOWN
from lmcache_core.sdk import BackendUnavailable

REPLY_S = 0.25
SLACK_S = 0.5


def disk(directory: Path, **settings: Any) -> dict[str, Any]:
    tiers = [{"host": 64 * SLOT_BYTES}, {"url": f"file://{directory}/kv"}]
    return {"tiers": tiers, **settings}


def serve(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """An ``lmc serve`` that is to fail."""
    command = [sys.executable, "-m", "lmcache_core.cli", "serve", *args]
    environ = {**os.environ, "LMCACHE_HOST_BYTES": "1MiB", **variables}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LIMIT_S)


def test_the_ready_line_says_where_it_is(tmp_path: Path) -> None:
    with serving(tmp_path, **disk(tmp_path)) as server:
        assert server.ready == {
            "event": "ready",
            "listening": [server.socket],
            "host_bytes": 64 * SLOT_BYTES,
            "tiers": ["disk"],
            "pid": server.pid,
        }
        assert stat.S_IMODE(os.stat(server.socket).st_mode) == 0o600


def test_the_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(LIMIT_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with serving(tmp_path) as server:
            assert manager.recv(100) == b"READY=1"
            assert server.stop() == 0
            assert manager.recv(100) == b"STOPPING=1"


def test_lmc_node_shows_what_a_server_does(tmp_path: Path) -> None:
    with serving(tmp_path, **disk(tmp_path)) as server, client(server.socket) as one:
        one.store(keys_of("a", 3))
        one.reserve(keys_of("b", 1))
        result = CliRunner().invoke(app, ["node", "--socket", server.socket, "--json"])
        status = json.loads(result.stdout)
        assert status["pid"] == server.pid
        assert status["host_chunks"] == 4
        assert status["host_used_bytes"] == 4 * SLOT_BYTES
        assert [tier["name"] for tier in status["tiers"]] == ["disk"]
        assert status["sessions"] == [
            {
                "pid": os.getpid(),
                "connections": 2,
                "slots": 1,
                "tickets": 0,
                "held_bytes": SLOT_BYTES,
            }
        ]
        assert status["counters"]["node.sessions_opened"] == 1
        text = CliRunner().invoke(app, ["node", "--socket", server.socket]).stdout
        assert "disk" in text and "host_used_bytes" in text


def test_server_and_engines_find_each_other_by_one_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_NODE", str(tmp_path / "ours.sock"))
    monkeypatch.setenv("LMCACHE_HOST_BYTES", "1MiB")
    command = [sys.executable, "-m", "lmcache_core.cli", "serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith(f"ready at {tmp_path}/ours.sock: host 0.0 GiB, below it nothing")
            result = CliRunner().invoke(app, ["node", "--json"])
            assert json.loads(result.stdout)["pid"] == process.pid
        finally:
            process.terminate()
        assert process.wait(LIMIT_S) == 0


def test_lmc_node_without_a_server_says_how_to_start_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["node", "--socket", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "lmc serve --socket" in result.output


def test_metrics_are_served_on_loopback(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(tmp_path, "--metrics", str(port)) as server, client(server.socket) as one:
        one.store(keys_of("a", 2))
        one.load(keys_of("a", 2))
        url = f"http://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(url, timeout=LIMIT_S) as answer:
            text = answer.read().decode()
        assert "lmcache_core:node_sessions 1.0" in text
        assert 'lmcache_core:node_events_total{event="sessions_opened"} 1.0' in text


def test_an_engine_without_a_server_is_told_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="no node server") as caught:
        Client(str(tmp_path / "node.sock"))
    assert f"lmc serve --socket {tmp_path}" in caught.value.hint


def test_a_second_server_is_refused_and_a_dead_ones_place_is_taken(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        second = serve("--socket", server.socket)
        assert second.returncode == 2
        assert "runs at" in second.stderr and "hint: " in second.stderr
        server.kill()
    assert os.path.exists(server.socket), "it was killed: its file is left"
    with serving(tmp_path) as server, client(server.socket) as one:
        assert one.store(keys_of("a", 1)) == 1
        assert server.stop() == 0
    assert not os.path.exists(server.socket)


def test_a_stranger_who_listens_there_is_left_alone(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(tmp_path / "node.sock"))
        stranger.listen()
        refused = serve("--socket", str(tmp_path / "node.sock"))
        assert refused.returncode == 2 and "runs at" in refused.stderr


def test_a_place_that_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    refused = serve("--socket", str(tmp_path / "node.sock"))
    assert refused.returncode == 2
    assert f"chmod 700 {tmp_path}" in refused.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--socket", "tcp://127.0.0.1:1"), "is no path"),
        (("--socket", "node.sock"), "is no address"),
        (("--socket", "/" + "x" * 120), "too long"),
        (("--listen", "tcp://127.0.0.1:0"), "asks for a token"),
        (("--listen", "/tmp/x", "--token-file", "t"), "is not TCP"),
        (("--metrics", "many"), "metrics can't be served"),
        (("--config", "/nonexistent.yaml"), "can't be read"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    place = () if "--socket" in args else ("--socket", str(tmp_path / "node.sock"))
    refused = serve(*args, *place)
    assert refused.returncode == 2, refused.stderr
    assert words in refused.stderr and "Traceback" not in refused.stderr


def test_the_default_place_is_this_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_path() == "/run/user/7/lmcache/node.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_path() == f"/tmp/lmcache-{os.getuid()}/node.sock"


def test_sigterm_flushes_to_disk_and_the_next_server_serves_it(tmp_path: Path) -> None:
    with serving(tmp_path, **disk(tmp_path)) as server, client(server.socket) as one:
        assert one.store(keys_of("a", 30)) == 30
        assert server.stop() == 0
    with serving(tmp_path, **disk(tmp_path)) as server, client(server.socket) as one:
        assert one.load(keys_of("a", 30)) == 30


def test_sigterm_writes_what_waited_for_its_eviction(tmp_path: Path) -> None:
    host, below = disk(tmp_path)["tiers"]
    tiers = [host, {**below, "write": "on_evict"}]
    with serving(tmp_path, tiers=tiers) as server, client(server.socket) as one:
        assert one.store(keys_of("a", 30)) == 30
        assert server.counter("disk.stored") == 0, "there is room in host"
        assert server.stop() == 0
    with serving(tmp_path, tiers=tiers) as server, client(server.socket) as one:
        assert one.load(keys_of("a", 30)) == 30


def test_a_server_that_could_not_flush_says_so(tmp_path: Path) -> None:
    with serving(tmp_path, **disk(tmp_path)) as server, client(server.socket) as one:
        slots = [s for s in one.reserve(keys_of("a", 5)) if not isinstance(s, Refusal)]
        for slot in slots:
            one.payload(slot)[:] = content(slot.key)
        shutil.rmtree(tmp_path / "kv")
        (tmp_path / "kv").write_text("no directory any more")
        os.kill(server.pid, signal.SIGTERM)
        one.cache.commit(slots)
        one.cache.poll()
        assert server.process.wait(LIMIT_S) == 1


def test_a_stopping_server_lets_writers_finish(tmp_path: Path) -> None:
    with serving(tmp_path, **disk(tmp_path)) as server, client(server.socket) as one:
        slots = [s for s in one.reserve(keys_of("a", 5)) if not isinstance(s, Refusal)]
        payloads = [one.payload(slot) for slot in slots]
        os.kill(server.pid, signal.SIGTERM)
        until(lambda: not os.path.exists(server.socket), "the end of listening")
        assert one.reserve(keys_of("b", 2)) == [Refusal.NO_ROOM] * 2
        assert one.load(keys_of("a", 2)) == 0
        time.sleep(0.2)
        assert server.process.poll() is None, "it waits for the slots"
        for slot, payload in zip(slots, payloads):
            payload[:] = content(slot.key)
        one.cache.commit(slots)
        one.cache.poll()
        assert server.process.wait(LIMIT_S) == 0
    with serving(tmp_path, **disk(tmp_path)) as server, client(server.socket) as one:
        assert one.load(keys_of("a", 5)) == 5


def test_a_stopping_server_waits_so_long_and_a_second_signal_ends_that(tmp_path: Path) -> None:
    with serving(tmp_path, drain_timeout_s=0.3) as server, client(server.socket) as one:
        one.reserve(keys_of("a", 1))
        assert server.stop() == 1
    with serving(tmp_path, drain_timeout_s=60) as server, client(server.socket) as one:
        one.reserve(keys_of("a", 1))
        os.kill(server.pid, signal.SIGTERM)
        until(lambda: not os.path.exists(server.socket), "the end of listening")
        assert server.stop() == 1


def test_engines_miss_for_a_moment_when_the_server_restarts(tmp_path: Path) -> None:
    with serving(tmp_path, **disk(tmp_path)) as server, client(server.socket) as one:
        one.store(keys_of("a", 5))
        until(lambda: server.counter("disk.stored") == 5)
        handle = one.cache.handle
        ticket = one.cache.prefetch(keys_of("a", 5))
        until(lambda: one.cache.poll() or ticket.done)
        pages = [one.payload(slot) for slot in ticket.hits()]
        (writing,) = one.reserve(keys_of("b", 1))
        assert not isinstance(writing, Refusal)
        server.kill()
        until(lambda: one.cache.poll() or not one.cache.connected)
        # What was given out stays readable and writable; it is only of no use any more.
        assert all(np.array_equal(p, content(s.key)) for p, s in zip(pages, ticket.hits()))
        one.payload(writing)[:] = 7
        assert one.load(keys_of("a", 5)) == 0
        assert one.cache.why_missed(one.cache.prefetch(keys_of("a", 5)), 0) == NODE_DOWN
        assert one.reserve(keys_of("c", 2)) == [Refusal.NO_ROOM] * 2
        one.cache.commit([writing])
        one.cache.release(ticket)
        with serving(tmp_path, **disk(tmp_path)):
            until(lambda: one.cache.poll() or one.cache.connected)
            assert one.cache.handle != handle
            assert one.load(keys_of("a", 5)) == 5, "the disk tier kept them"
            assert one.load(keys_of("b", 1)) == 0
            assert one.store(keys_of("c", 2)) == 2
            with pytest.raises(ArenaError, match="no such session"):
                handle.attach(warn=print, prefault=False)
        counted = one.cache.metrics.snapshot()
        assert (counted["node.lost"], counted["node.reconnected"]) == (1, 1)


def test_an_offset_never_meets_the_memory_of_another_server(tmp_path: Path) -> None:
    with serving(tmp_path) as server, client(server.socket) as one:
        one.store(keys_of("a", 2))
        ticket = one.cache.prefetch(keys_of("a", 2))
        until(lambda: one.cache.poll() or ticket.done)
        (writing,) = one.reserve(keys_of("b", 1))
        assert not isinstance(writing, Refusal)
        handle = one.cache.handle
        server.kill()
        with serving(tmp_path) as again, client(again.socket) as other:
            other.store(keys_of("x", 5))
            until(lambda: one.cache.poll() or one.cache._fresh, "a new link")
            for ends in (lambda: one.cache.release(ticket), lambda: one.cache.abort([writing])):
                one.cache.poll()
                one.cache.wait(0.001)
                assert one.cache.handle == handle and not one.cache.connected
                assert one.reserve(keys_of("c", 1)) == [Refusal.NO_ROOM]
                for key, slot in zip(keys_of("a", 2), ticket.hits()):
                    assert np.array_equal(one.payload(slot), content(key))
                ends()
            one.cache.poll()
            assert one.cache.connected and one.cache.handle != handle
            assert one.load(keys_of("x", 5)) == 5


@pytest.fixture
def frozen(tmp_path: Path) -> Any:
    with serving(tmp_path) as server:
        yield server


def freeze(server: Server) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    stat_file = Path(f"/proc/{server.pid}/stat")
    until(lambda: stat_file.read_text().rpartition(")")[2].split()[0] == "T", "the stop")


def test_a_frozen_server_costs_a_reservation_one_time_out(frozen: Server) -> None:
    with client(frozen.socket) as one:
        one.store(keys_of("a", 3))
        freeze(frozen)
        start_s = time.monotonic()
        assert one.reserve(keys_of("b", 2)) == [Refusal.NO_ROOM] * 2
        assert REPLY_S <= time.monotonic() - start_s < REPLY_S + SLACK_S
        start_s = time.monotonic()
        for _ in range(20):
            assert one.reserve(keys_of("b", 2)) == [Refusal.NO_ROOM] * 2
            assert one.load(keys_of("a", 3)) == 0
        assert time.monotonic() - start_s < SLACK_S, "only the first one pays"
        os.kill(frozen.pid, signal.SIGCONT)
        until(lambda: one.cache.poll() or one.cache.connected)
        assert one.load(keys_of("a", 3)) == 3
        assert one.store(keys_of("b", 2)) == 2


def test_a_frozen_server_ends_tickets_soon(frozen: Server) -> None:
    with client(frozen.socket, lookup_deadline_s=30) as one:
        one.store(keys_of("a", 3))
        freeze(frozen)
        start_s = time.monotonic()
        tickets = [one.cache.prefetch(keys_of("a", 3)) for _ in range(5)]
        until(lambda: one.cache.poll() or all(ticket.done for ticket in tickets))
        assert time.monotonic() - start_s < REPLY_S + SLACK_S
        for ticket in tickets:
            assert ticket.hits() == []
            assert one.cache.why_missed(ticket, 0) == NODE_DOWN
            one.cache.release(ticket)
        os.kill(frozen.pid, signal.SIGCONT)
        until(lambda: one.cache.poll() or one.cache.connected)
        assert one.load(keys_of("a", 3)) == 3
        one.detach()
        until(lambda: len(frozen.status()["sessions"]) == 1, "the end of the old session")


def test_what_is_written_while_the_server_is_frozen_counts_when_it_wakes(frozen: Server) -> None:
    with client(frozen.socket) as one, client(frozen.socket) as two:
        slots = [s for s in one.reserve(keys_of("a", 2)) if not isinstance(s, Refusal)]
        for slot in slots:
            one.payload(slot)[:] = content(slot.key)
        freeze(frozen)
        assert one.reserve(keys_of("b", 1)) == [Refusal.NO_ROOM]
        one.cache.forget(keys_of("a", 2)[1:])
        one.cache.commit(slots)
        os.kill(frozen.pid, signal.SIGCONT)
        until(lambda: one.cache.poll() or one.cache.connected)
        until(lambda: two.cache.poll() or two.load(keys_of("a", 2)) == 1)
        assert two.store(keys_of("b", 1)) == 1, "what nobody heard of is not left reserved"


def test_what_is_forgotten_while_the_server_is_frozen_is_forgotten_when_it_wakes(
    frozen: Server,
) -> None:
    with client(frozen.socket) as one:
        one.store(keys_of("a", 3))
        freeze(frozen)
        assert one.reserve(keys_of("b", 1)) == [Refusal.NO_ROOM]
        one.cache.forget(keys_of("a", 3)[2:])
        os.kill(frozen.pid, signal.SIGCONT)
        until(lambda: one.cache.poll() or one.cache.connected)
        assert one.load(keys_of("a", 3)) == 2


def test_a_client_that_slept_does_not_blame_the_server(frozen: Server) -> None:
    with client(frozen.socket) as one:
        one.store(keys_of("a", 3))
        ticket = one.cache.prefetch(keys_of("a", 3))
        time.sleep(2 * REPLY_S)
        one.cache.poll()
        assert ticket.done and len(ticket.hits()) == 3
        assert one.cache.connected
