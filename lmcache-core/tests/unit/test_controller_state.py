"""Hard state: SQLite and Redis answer the same, and say clearly what is wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from controller_redis import RedisServer, redis_server
from pd_proxy_rig import until

from lmcache_core.controller.state import Document, State, open_state
from lmcache_core.controller.state_redis import RedisState
from lmcache_core.controller.state_sqlite import SCHEMA, SqliteState
from lmcache_core.sdk import BackendUnavailable, ConfigError

KINDS = ("job", "pin")


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as found:
        yield found


@pytest.fixture(params=["file", "memory", "redis"])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[State]:
    if request.param == "redis":
        server = request.getfixturevalue("server")
        server.empty()
        address = server.url
    else:
        address = str(tmp_path / "state") if request.param == "file" else ":memory:"
    with contextlib.closing(open_state(address)) as found:
        yield found


def told(state: State, after: int = 0, limit: int = 100) -> list[tuple[str, str, bytes | None]]:
    changes = state.changes(KINDS, after=after, limit=limit)
    return [(found.kind, found.id, found.value) for found in changes.documents]


def value(document: Document | None) -> bytes | None:
    return document.value if document is not None else None


def test_a_document_is_what_was_put_last(state: State) -> None:
    assert state.get("job", "a") is None
    first = state.put("job", "a", b"\x00one:\xff", expect=None)
    found = state.get("job", "a")
    assert found is not None and (found.value, found.version) == (b"\x00one:\xff", first)
    second = state.put("job", "a", b"", expect=None)
    assert first is not None and second is not None and second > first
    assert value(state.get("job", "a")) == b""
    assert state.get("pin", "a") is None, "kinds are apart"


def test_a_put_holds_only_for_the_version_that_it_expects(state: State) -> None:
    first = state.put("job", "a", b"one", expect=0)
    assert state.put("job", "a", b"two", expect=0) is None, "there is one already"
    assert state.put("job", "b", b"two", expect=first) is None, "there is none"
    second = state.put("job", "a", b"two", expect=first)
    assert second is not None
    assert state.put("job", "a", b"three", expect=first) is None
    assert value(state.get("job", "a")) == b"two"
    state.delete("job", "a")
    assert state.put("job", "a", b"four", expect=second) is None
    assert state.put("job", "a", b"four", expect=0) is not None


def test_of_many_who_expect_the_same_one_wins(state: State) -> None:
    start = threading.Barrier(8)

    def write(number: int) -> int | None:
        start.wait()
        return state.put("job", "a", b"%d" % number, expect=0)

    with ThreadPoolExecutor(8) as pool:
        wins = [number for number, won in enumerate(pool.map(write, range(8))) if won is not None]
    assert len(wins) == 1
    assert value(state.get("job", "a")) == b"%d" % wins[0]


def test_changes_are_told_oldest_first(state: State) -> None:
    state.put("job", "a", b"1", expect=None)
    middle = state.put("pin", "b", b"2", expect=None)
    state.put("order", "not watched", b"3", expect=None)
    state.put("job", "c", b"4", expect=None)
    state.put("job", "a", b"5", expect=None)
    assert told(state) == [("pin", "b", b"2"), ("job", "c", b"4"), ("job", "a", b"5")]
    assert told(state, limit=2) == [("pin", "b", b"2"), ("job", "c", b"4")]
    assert middle is not None
    assert told(state, after=middle) == [("job", "c", b"4"), ("job", "a", b"5")]


def test_a_deletion_is_a_change(state: State) -> None:
    version = state.put("job", "a", b"1", expect=None)
    state.delete("job", "a")
    state.delete("job", "never there")
    assert state.get("job", "a") is None
    assert version is not None and told(state, after=version) == [("job", "a", None)]


def test_documents_end(state: State) -> None:
    state.put("job", "short", b"1", expect=None, ttl_s=0.05)
    state.put("job", "long", b"1", expect=None, ttl_s=60)
    until(lambda: state.get("job", "short") is None)
    assert value(state.get("job", "long")) == b"1"
    assert state.put("job", "short", b"2", expect=0) is not None, "it is as if it never was"
    until(lambda: value(state.get("job", "short")) == b"2")


def test_a_put_without_an_end_keeps_what_had_one(state: State) -> None:
    first = state.put("job", "a", b"1", expect=None, ttl_s=0.05)
    state.put("job", "b", b"1", expect=None, ttl_s=0.05)
    state.put("job", "a", b"2", expect=first)
    until(lambda: state.get("job", "b") is None)
    assert value(state.get("job", "a")) == b"2"


def test_several_are_put_at_once(state: State) -> None:
    versions = state.put_all("job", {"a": b"1", "b": b"2"})
    found = [state.get("job", id) for id in "ab"]
    assert [(f.value, f.version) for f in found if f] == list(zip((b"1", b"2"), versions))
    assert state.count("job") == 2 and state.count("pin") == 0


def test_it_is_the_same_store_for_as_long_as_it_is_not_emptied(state: State) -> None:
    epoch = state.changes(KINDS, after=0, limit=1).epoch
    state.put("job", "a", b"1", expect=None)
    assert state.changes(KINDS, after=0, limit=1).epoch == epoch != ""


def test_after_its_end_it_says_so() -> None:
    state = open_state(":memory:")
    state.close()
    with pytest.raises(BackendUnavailable, match="closed"):
        state.get("job", "a")


# SQLite.


def test_a_file_keeps_everything_and_is_readable_for_its_user_only(tmp_path: Path) -> None:
    path = tmp_path / "state"
    first = SqliteState(str(path))
    version = first.put("job", "a", b"1", expect=0)
    epoch = first.changes(KINDS, after=0, limit=1).epoch
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    first.close()
    with contextlib.closing(SqliteState(str(path))) as second:
        assert told(second) == [("job", "a", b"1")]
        assert second.changes(KINDS, after=0, limit=1).epoch == epoch
        again = second.put("job", "a", b"2", expect=version)
        assert version is not None and again is not None and again > version


def test_a_killed_process_loses_nothing_that_was_put(tmp_path: Path) -> None:
    path = tmp_path / "state"
    code = (
        "import sys\n"
        "from lmcache_core.controller.state_sqlite import SqliteState\n"
        "state = SqliteState(sys.argv[1])\n"
        "for number in range(10**9):\n"
        "    state.put('job', 'a', b'%d' % number, expect=None)\n"
        "    print(number, flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(20):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split()
        process.wait()
    with contextlib.closing(SqliteState(str(path))) as state:
        found = value(state.get("job", "a"))
    last = int(said[-1]) if said else 19
    assert found is not None and int(found) >= last


def test_a_second_controller_is_told_that_the_file_is_taken(tmp_path: Path) -> None:
    path = str(tmp_path / "state")
    with contextlib.closing(SqliteState(path)):
        with pytest.raises(ConfigError, match="another controller has the state") as told:
            SqliteState(path)
        assert "--state" in told.value.hint
    SqliteState(path).close()


def _text(path: Path) -> None:
    path.write_text("no database, but long enough to look like one" * 100)
    path.chmod(0o600)


def _readable(path: Path) -> None:
    SqliteState(str(path)).close()
    path.chmod(0o644)


def _later(path: Path) -> None:
    SqliteState(str(path)).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_text, "is no state of a controller"),
        (_readable, "others can read"),
        (_later, "a later version"),
        (lambda path: path.mkdir(), "can't be opened"),
    ],
)
def test_a_file_that_is_none_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / "state"
    spoil(path)
    with pytest.raises(ConfigError, match=said) as told:
        SqliteState(str(path))
    assert told.value.hint


def test_a_full_disk_is_unavailable_and_no_harm() -> None:
    state = SqliteState(":memory:")
    state.put("job", "a", b"1", expect=None)
    assert state._db is not None
    state._db.execute("PRAGMA max_page_count = 16")
    with pytest.raises(BackendUnavailable, match="full"):
        state.put("job", "b", os.urandom(1 << 20), expect=None)
    assert told(state) == [("job", "a", b"1")]
    state.close()


def test_an_address_of_no_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="'http' is no kind of state"):
        open_state("http://127.0.0.1:1")


# Redis.


def test_a_lost_redis_is_unavailable_until_it_is_back() -> None:
    with redis_server() as server:
        state = RedisState(server.url, timeout_s=0.2)
        state.put("job", "a", b"1", expect=None)
        epoch = state.changes(KINDS, after=0, limit=1).epoch
        server.freeze()
        with pytest.raises(BackendUnavailable) as told_frozen:
            state.get("job", "a")
        assert told_frozen.value.retryable and told_frozen.value.hint
        server.resume()
        until(lambda: _answers(state))
        server.kill()
        with pytest.raises(BackendUnavailable):
            state.put("job", "a", b"2", expect=None)
        server.start()
        assert state.get("job", "a") is None
        assert state.changes(KINDS, after=0, limit=1).epoch != epoch, "it was emptied"
        state.close()


def _answers(state: State) -> bool:
    try:
        return value(state.get("job", "a")) == b"1"
    except BackendUnavailable:
        return False


def test_a_password_is_never_shown(server: RedisServer) -> None:
    url = server.url.replace("redis://", "redis://me:hunter2@")
    state = RedisState(url, timeout_s=1)
    assert "hunter2" not in state.address
    with pytest.raises(ConfigError) as told:
        state.get("job", "a")
    assert "hunter2" not in str(told.value) and "refuses us" in str(told.value)
    state.close()


def test_two_controllers_see_each_other(server: RedisServer) -> None:
    server.empty()
    one, other = RedisState(server.url), RedisState(server.unix_url)
    version = one.put("job", "a", b"1", expect=0)
    assert told(other) == [("job", "a", b"1")]
    assert other.put("job", "a", b"2", expect=version) is not None
    assert one.put("job", "a", b"3", expect=version) is None
    one.close()
    other.close()


def test_the_extra_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lmcache_core.controller.state_redis", raising=False)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigError, match="needs redis") as told:
        open_state("redis://127.0.0.1:1")
    assert "lmcache-core[controller-redis]" in told.value.hint
