"""What the conformance suite can't know of nixl+posix: the library's own ways to fail."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nixl_support import get, open_url, put

from lmcache_backend_nixl import plugin
from lmcache_backend_nixl.library import Agent, TransferFailed
from lmcache_conformance import Memory, small_disk, unmount, value, within
from lmcache_conformance.rig import Host
from lmcache_core.connectors.file import FileConnector
from lmcache_core.sdk import ConfigError, GetResult, Status

MIB = 1 << 20


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def store(tmp_path: Path, host: Host) -> Iterator[Any]:
    opened = open_url(f"nixl+posix://{tmp_path}/kv", host)
    yield opened
    opened.close()


class Counted:
    """Counts what the real agent hands out and takes back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.handles = self.registrations = 0
        move = Agent.move

        def watched(agent: Agent, *arguments: Any) -> None:
            real = agent._agent
            agent._agent = _Watched(real, self)
            try:
                move(agent, *arguments)
            finally:
                agent._agent = real

        monkeypatch.setattr(Agent, "move", watched)


class _Watched:
    def __init__(self, real: Any, counted: Counted) -> None:
        self._real, self._counted = real, counted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def initialize_xfer(self, *arguments: Any) -> Any:
        made = self._real.initialize_xfer(*arguments)
        self._counted.handles += 1
        return made

    def release_xfer_handle(self, handle: Any) -> None:
        self._real.release_xfer_handle(handle)
        self._counted.handles -= 1

    def register_memory(self, *arguments: Any, **named: Any) -> Any:
        made = self._real.register_memory(*arguments, **named)
        self._counted.registrations += 1
        return made

    def deregister_memory(self, held: Any) -> None:
        self._real.deregister_memory(held)
        self._counted.registrations -= 1


@pytest.mark.parametrize("api", ["aio", "uring", "posix_aio"])
def test_every_kernel_interface_moves_batches(tmp_path: Path, host: Host, api: str) -> None:
    store = open_url(f"nixl+posix://{tmp_path}/kv?api={api}&queue_depth=8", host)
    keys = [b"k%d" % number for number in range(40)]
    assert put(store, keys, 70_001) == [Status.OK] * 40
    memory = Memory([70_001] * 40)
    results = store.get_into(keys, memory.buffers(), within(10))
    assert results == [GetResult(Status.OK, 70_001)] * 40
    assert all(memory.bytes_of(i) == value(sum(key), 70_001) for i, key in enumerate(keys))
    store.close()


def test_it_reads_what_file_wrote_and_file_reads_what_it_wrote(tmp_path: Path, store: Any) -> None:
    other = FileConnector(f"{tmp_path}/kv")
    assert put(store, [b"ours"], MIB) == [Status.OK]
    assert put(other, [b"theirs"], MIB) == [Status.OK]
    assert get(other, b"ours", MIB)[1] == value(sum(b"ours"), MIB)
    assert get(store, b"theirs", MIB)[1] == value(sum(b"theirs"), MIB)
    assert {entry.key for entry in store.scan(b"", within(5))} == {b"ours", b"theirs"}
    other.close()


def test_direct_wants_pages_and_rejects_the_rest(tmp_path: Path, host: Host) -> None:
    store = open_url(f"nixl+posix://{tmp_path}/kv?direct=true", host)
    assert store.capabilities.alignment == 4096
    keys = [b"page", b"odd", b"pages"]
    memory = Memory.of([value(1, 4096), value(2, 4097), value(3, 8 * 4096)])
    answers = store.put_from(keys, memory.buffers(read_only=True), within(10))
    assert answers == [Status.OK, Status.REJECTED, Status.OK]
    assert get(store, b"pages", 8 * 4096)[1] == value(3, 8 * 4096)
    shifted = Memory([4096], offset=512)
    assert store.get_into([b"page"], shifted.buffers(), within(5)) == [GetResult(Status.REJECTED)]
    store.close()


def test_handles_and_registrations_come_back_whatever_happens(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    put(store, [b"a", b"b"], MIB)
    get(store, b"a", MIB)
    get(store, b"absent", MIB)

    def refuse(self: Agent, handle: Any, clock: Any) -> None:
        raise TransferFailed("refused by the test")

    monkeypatch.setattr(Agent, "_wait", refuse)
    assert put(store, [b"c"], MIB) == [Status.OK], "plain calls do it"
    assert get(store, b"a", MIB)[1] == value(sum(b"a"), MIB)
    assert (counted.handles, counted.registrations) == (0, 0)


def test_one_file_that_shrinks_does_not_harm_its_neighbours(tmp_path: Path, store: Any) -> None:
    """The library fails the whole transfer, without saying which file it was."""
    assert put(store, [b"a", b"b", b"c"], MIB) == [Status.OK] * 3
    path = Path(store._files.path(b"b"))
    memory = Memory([MIB] * 3)
    move = Agent.move

    def cut_first(agent: Agent, op: str, pieces: Any, clock: Any) -> None:
        os.truncate(path, 1000)
        move(agent, op, pieces, clock)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Agent, "move", cut_first)
        results = store.get_into([b"a", b"b", b"c"], memory.buffers(), within(10))
    assert [result.status for result in results] == [Status.OK, Status.FAILED, Status.OK]
    assert memory.bytes_of(2) == value(sum(b"c"), MIB)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_rejects_and_keeps_what_is_there(tmp_path: Path, host: Host) -> None:
    disk = small_disk(tmp_path / "disk", 8 * MIB)
    try:
        store = open_url(f"nixl+posix://{disk}/kv", host)
        assert put(store, [b"first"], 2 * MIB) == [Status.OK]
        assert put(store, [b"large"], 16 * MIB) == [Status.REJECTED]
        assert get(store, b"first", 2 * MIB)[1] == value(sum(b"first"), 2 * MIB)
        assert get(store, b"large", 16 * MIB)[0].status is Status.MISS
        assert put(store, [b"second"], 2 * MIB) == [Status.OK], "the room is not given back"
        store.close()
    finally:
        unmount(disk)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Transfers do not end until it is set, as on a device that stands still."""
    gate = threading.Event()
    wait = Agent._wait

    def held(self: Agent, handle: Any, clock: Any) -> None:
        gate.wait(20)
        wait(self, handle, clock)

    monkeypatch.setattr(Agent, "_wait", held)
    yield gate
    gate.set()


def test_a_transfer_that_does_not_end_is_abandoned_until_it_does(
    store: Any, host: Host, stuck: threading.Event
) -> None:
    memory = Memory.of([value(1, MIB)])
    buffers = memory.buffers(read_only=True, first_token=7)
    started_s = time.monotonic()
    assert store.put_from([b"k"], buffers, within(0.2)) == [Status.ABANDONED]
    assert time.monotonic() - started_s < 0.45
    time.sleep(0.2)
    assert host.released == []
    stuck.set()
    end_s = time.monotonic() + 5
    while not host.released and time.monotonic() < end_s:
        time.sleep(0.01)
    assert host.released == [7]
    assert get(store, b"k", MIB)[1] == value(1, MIB), "in doubt, but whole"


def test_a_submitted_get_that_is_late_is_abandoned(
    store: Any, host: Host, stuck: threading.Event
) -> None:
    stuck.set()
    assert put(store, [b"k"], MIB) == [Status.OK]
    stuck.clear()
    memory = Memory([MIB])
    ticket = store.submit_get([b"k"], memory.buffers(first_token=9), within(0.2))
    assert store.poll(ticket) is None
    time.sleep(0.25)
    assert store.poll(ticket) == [GetResult(Status.ABANDONED)]
    with pytest.raises(KeyError):
        store.poll(ticket)
    assert host.released == []
    stuck.set()
    end_s = time.monotonic() + 5
    while not host.released and time.monotonic() < end_s:
        time.sleep(0.01)
    assert host.released == [9]


def test_close_does_not_wait_for_a_transfer_that_does_not_end(
    store: Any, stuck: threading.Event
) -> None:
    memory = Memory.of([value(1, MIB)])
    assert store.put_from([b"k"], memory.buffers(read_only=True), within(0.1)) == [Status.ABANDONED]
    started_s = time.monotonic()
    store.close()
    assert time.monotonic() - started_s < 5


def test_without_the_plugin_the_error_says_what_to_do(tmp_path: Path) -> None:
    """NIXL looks for its plugins in a directory; here it is an empty one."""
    code = (
        "import sys; from pathlib import Path\n"
        "from lmcache_conformance.rig import Host; from lmcache_core import plugins\n"
        "from lmcache_core.sdk import ConfigError\n"
        "try: plugins.open_connector(sys.argv[1], Host(Path(sys.argv[2])).services)\n"
        "except ConfigError as error: print('refused:', error)\n"
    )
    empty = tmp_path / "plugins"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, f"nixl+posix://{tmp_path}/kv", str(tmp_path)],
        env={**os.environ, "NIXL_PLUGIN_DIR": str(empty)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "plugin POSIX does not load" in done.stdout, done.stderr[-2000:]
    assert "pip install -U 'lmcache-backend-nixl[cu12]'" in done.stdout


@pytest.mark.parametrize("scheme, name", [("nixl+posix", "POSIX"), ("nixl+obj", "OBJ")])
def test_without_the_plugin_the_probe_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scheme: str, name: str
) -> None:
    url = f"{scheme}://{tmp_path}/kv"
    assert plugin.lmcache_probe(url, dict(plugin._DEFAULTS)).usable
    monkeypatch.setenv("NIXL_PLUGIN_DIR", str(tmp_path))
    probe = plugin.lmcache_probe(url, dict(plugin._DEFAULTS))
    assert not probe.usable and probe.reason == f"libplugin_{name}.so is not in {tmp_path}"
    assert "pip install 'lmcache-backend-nixl[" in probe.hint and "NIXL_PLUGIN_DIR" in probe.hint


def test_without_nixl_probe_and_open_name_the_line_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: Host
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = dict(plugin._DEFAULTS)
    for scheme, extra in (("nixl+posix", "cu12"), ("nixl+obj", "obj")):
        probe = plugin.lmcache_probe(f"{scheme}:///", options)
        assert not probe.usable and probe.hint == f"pip install 'lmcache-backend-nixl[{extra}]'"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "nixl_cu12", None)
    monkeypatch.setitem(sys.modules, "nixl_cu13", None)
    monkeypatch.setitem(sys.modules, "nixl_cu12._api", None)
    monkeypatch.setitem(sys.modules, "nixl_cu13._api", None)
    with pytest.raises(ConfigError, match="can't be imported") as caught:
        open_url(f"nixl+posix://{tmp_path}/kv", host)
    assert caught.value.hint == "pip install 'lmcache-backend-nixl[cu12]'"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nixl+posix://relative/kv", "is not nixl.posix:///absolute/directory"),
        ("nixl+posix:///tmp/kv?lanes=0", "lanes=0 is out of range"),
        ("nixl+posix:///tmp/kv?endpoint=http://h", "endpoint is for nixl.obj://"),
        ("nixl+obj://bucket?direct=true", "direct is for nixl.posix://"),
        ("nixl+obj://", "names no bucket"),
        ("nixl+obj://bucket?endpoint=host:1", "is no http:// or https:// URL"),
    ],
)
def test_wrong_urls_and_options(host: Host, url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_url(url, host)
