"""Writers against readers on the same keys, and writers that die at every command."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
import redis
from redis_support import Open, get, put

from lmcache_backend_redis.connector import RedisConnector
from lmcache_backend_redis.layout import Head, head_name
from lmcache_backend_redis.server import RedisServer
from lmcache_backend_redis.sessions import Sessions
from lmcache_backend_redis.wire import Session
from lmcache_conformance import value
from lmcache_core.sdk import BackendUnavailable, Status

MIB = 1 << 20
SECONDS = float(os.environ.get("LMC_RACE_SECONDS", "30"))
NBYTES = 2 * MIB + 5000


def stamped(number: int) -> bytes:
    """A value that says in every part which put it is of."""
    return (number.to_bytes(8, "little") * (NBYTES // 8 + 1))[:NBYTES]


@pytest.mark.slow
def test_two_writers_and_eight_readers_never_mix_nor_miss(
    server: RedisServer, opened: Open
) -> None:
    keys = [b"k%d" % i for i in range(3)]
    stop_s = time.monotonic() + SECONDS
    seen: Counter[str] = Counter()
    wrong: list[str] = []

    def write(store: RedisConnector, writer: int) -> None:
        number = writer
        while time.monotonic() < stop_s:
            answer = put(store, keys[number % 3], stamped(number))
            seen["put " + answer.value] += 1
            number += 2

    def read(store: RedisConnector, reader: int) -> None:
        turn = reader
        while time.monotonic() < stop_s and not wrong:
            turn += 1
            result, got = get(store, keys[turn % 3], NBYTES)
            seen["get " + result.status.value] += 1
            if result.status is Status.OK and got != stamped(int.from_bytes(got[:8], "little")):
                wrong.append("a mix of two puts")

    first = opened(server.unix_url, piece_bytes=MIB)
    for i, key in enumerate(keys):
        assert put(first, key, stamped(i)) is Status.OK
    stores = [opened(server.unix_url, piece_bytes=MIB) for _ in range(10)]
    jobs = [(write, 0), (write, 1), *((read, i) for i in range(8))]
    threads = [threading.Thread(target=j, args=(s, i)) for s, (j, i) in zip(stores, jobs)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong
    assert set(seen) == {"put ok", "get ok"}, seen
    assert seen["put ok"] > 5 * SECONDS and seen["get ok"] > 5 * SECONDS


class Dies(Exception):
    """The writer's process ends here."""


class DyingSession:
    """Passes on ``left`` sends, one command at a time; then the connection is cut."""

    def __init__(self, session: Session, left: int) -> None:
        self._session = session
        self.left = left

    def send(self, parts: list[bytes], deadline_s: float) -> None:
        data = b"".join(bytes(part) for part in parts)
        for one in split_commands(data):
            if not self.left:
                # What was sent before is carried out, as after a kill.
                time.sleep(0.01)
                self._session.close()
                raise Dies
            self.left -= 1
            self._session.send([one], deadline_s)

    def __getattr__(self, name: str) -> object:
        return getattr(self._session, name)


def split_commands(data: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(data):
        start = at
        end = data.index(b"\r\n", at)
        count, at = int(data[at + 1 : end]), end + 2
        for _ in range(count):
            end = data.index(b"\r\n", at)
            at = end + 2 + int(data[at + 1 : end]) + 2
        found.append(data[start:at])
    return found


def die_after(store: RedisConnector, commands: int, act: Callable[[], object]) -> bool:
    """Whether ``act`` died; its writer sends ``commands`` commands at most."""
    sessions: Sessions = store._sessions
    connect = sessions.connect

    def dying(deadline_s: float) -> Session:
        return DyingSession(connect(deadline_s), commands)  # type: ignore[return-value]

    sessions.connect = dying  # type: ignore[method-assign]
    sessions.drop_idle()
    try:
        act()
    except Dies:
        return True
    finally:
        sessions.connect = connect  # type: ignore[method-assign]
        sessions.drop_idle()
    return False


def orphans(raw: redis.Redis) -> list[bytes]:
    """Names that will never go and that no head names."""
    named: set[bytes] = set()
    names = raw.keys("lmc:*")
    for name in names:
        if name.endswith(b"}"):
            head = Head.decode(raw.get(name))
            assert head is not None
            named |= {name, *head.names(bytes.fromhex(name[5:-1].decode()))}
    return [name for name in names if name not in named and raw.pttl(name) == -1]


@pytest.mark.parametrize("op", ["put", "replace", "delete"])
def test_a_writer_that_dies_at_any_command_leaves_nothing_for_ever(
    server: RedisServer, opened: Open, op: str
) -> None:
    raw = redis.Redis(unix_socket_path=str(server.socket_path))
    options = {"piece_bytes": MIB, "longest_deadline_s": 0.1}
    for commands in range(100):
        raw.flushall()
        store = opened(server.unix_url, **options)
        if op != "put":
            assert put(store, b"k", value(1, 3 * MIB)) is Status.OK
        if op == "delete":
            died = die_after(store, commands, lambda s=store: s.delete_one(b"k", 5))
        else:
            died = die_after(
                store, commands, lambda s=store: s.put_one(b"k", memoryview(value(2, 3 * MIB)), 5)
            )
        reader = opened(server.unix_url, **options)
        result, got = get(reader, b"k", 3 * MIB)
        before = [] if op == "put" else [value(1, 3 * MIB)]
        after = [] if op == "delete" else [value(2, 3 * MIB)]
        if result.status is Status.OK:
            assert got in before + after, "not the whole bytes of one put"
        else:
            assert result.status is Status.MISS and (op != "replace")
        time.sleep(0.25)
        assert orphans(raw) == []
        left = sum(raw.strlen(name) for name in raw.keys("lmc:*"))
        assert left in (0, 3 * MIB + 32), "bytes of an unfinished put after the grace"
        if not died:
            assert commands >= {"put": 10, "replace": 13, "delete": 4}[op]
            return
    raise AssertionError("it never came to its end")


def test_pieces_that_are_evicted_before_the_head_is_set_fail_the_put(
    server: RedisServer, opened: Open
) -> None:
    raw = redis.Redis(unix_socket_path=str(server.socket_path))
    store = opened(server.unix_url, piece_bytes=MIB)
    orders = store._writer._orders

    def evict_first(*args: object) -> list[bytes]:
        raw.delete(sorted(raw.keys("lmc:{6b}:*"))[0])
        return orders(*args)  # type: ignore[arg-type]

    store._writer._orders = evict_first  # type: ignore[method-assign]
    assert put(store, b"k", value(1, 3 * MIB)) is Status.FAILED
    assert raw.get(head_name(b"k")) is None
    assert raw.keys("lmc:*") == []


def test_a_busy_key_is_published_in_the_end(server: RedisServer, opened: Open) -> None:
    """Another writer slips in between WATCH and EXEC, twice."""
    store, other = opened(server.unix_url), opened(server.unix_url)
    orders, left = store._writer._orders, [2]

    def slip_in(*args: object) -> list[bytes]:
        if left[0]:
            left[0] -= 1
            assert put(other, b"k", value(5 + left[0], 5000)) is Status.OK
        return orders(*args)  # type: ignore[arg-type]

    store._writer._orders = slip_in  # type: ignore[method-assign]
    assert put(store, b"k", value(1, 5000)) is Status.OK
    assert get(other, b"k", 5000)[1] == value(1, 5000)


def test_a_server_that_goes_away_during_a_put_leaves_the_old_value(
    server: RedisServer, opened: Open
) -> None:
    store = opened(server.unix_url)
    put(store, b"k", value(1, 5000))
    orders = store._writer._orders

    def kill(*args: object) -> list[bytes]:
        server.kill()
        return orders(*args)  # type: ignore[arg-type]

    store._writer._orders = kill  # type: ignore[method-assign]
    with pytest.raises(BackendUnavailable):
        put(store, b"k", value(2, 5000))
