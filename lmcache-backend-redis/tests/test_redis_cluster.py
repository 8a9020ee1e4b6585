"""A real cluster whose slots move, whose nodes die and freeze, in the middle of batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from redis.crc import key_slot
from redis_support import open_url

from lmcache_backend_redis.fleets import RedisCluster
from lmcache_backend_redis.layout import head_name
from lmcache_conformance import Memory, value, within
from lmcache_core.sdk import BackendUnavailable, ConfigError, RemoteConnector, Status

MIB = 1 << 20
SIZE = 2 * MIB + 5


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with RedisCluster(replica=False) as found:
        yield found


@pytest.fixture
def store(cluster: RedisCluster) -> Iterator[RemoteConnector]:
    for node in range(len(cluster.nodes)):
        cluster.client(node).flushall()
    opened = open_url(f"{cluster.url}?piece_bytes={MIB}")
    yield opened
    opened.close()


def put(store: RemoteConnector, keys: list[bytes], size: int = 5000, s: float = 10) -> list[Status]:
    memory = Memory.of([value(seed_of(key), size) for key in keys])
    return store.put_from(keys, memory.buffers(read_only=True), within(s))


def get(store: RemoteConnector, keys: list[bytes], size: int = 5000, s: float = 10) -> list[Status]:
    """Statuses; what is OK has the right bytes."""
    memory = Memory([size] * len(keys))
    results = store.get_into(keys, memory.buffers(), within(s))
    for number, (key, result) in enumerate(zip(keys, results)):
        if result.status is Status.OK:
            assert memory.bytes_of(number, result.nbytes) == value(seed_of(key), size)
    return [result.status for result in results]


def seed_of(key: bytes) -> int:
    return sum(key)


def slot_of(key: bytes) -> int:
    return key_slot(head_name(key))


def keys_of_node(cluster: RedisCluster, node: int, count: int) -> list[bytes]:
    found: list[bytes] = []
    number = 0
    while len(found) < count:
        key = b"key-%d" % number
        number += 1
        if cluster.master_of(slot_of(key)) == node:
            found.append(key)
    return found


def moved_to(cluster: RedisCluster, key: bytes) -> int:
    return (cluster.master_of(slot_of(key)) + 1) % 3


def test_a_batch_is_split_over_the_nodes(cluster: RedisCluster, store: RemoteConnector) -> None:
    keys = [b"k%d" % number for number in range(100)]
    assert put(store, keys) == [Status.OK] * 100
    assert all(cluster.client(node).dbsize() > 20 for node in range(3))
    asked = [b"absent", *keys[:50], b"none", *keys[50:]]
    found = [Status.MISS, *[Status.OK] * 50, Status.MISS, *[Status.OK] * 50]
    assert store.exists(asked, within(5)) == found
    assert get(store, asked) == found
    listed = {entry.key: entry.nbytes for entry in store.scan(b"k", within(10))}  # type: ignore[attr-defined]
    assert listed == dict.fromkeys(keys, 5000)
    assert store.delete([*keys[:10], b"absent"], within(5)) == [Status.OK] * 11
    assert get(store, keys) == [Status.MISS] * 10 + [Status.OK] * 90


def test_nodes_work_beside_each_other(cluster: RedisCluster, store: RemoteConnector) -> None:
    """A node that stands still costs its own keys the deadline, the others nothing; later calls
    do not wait for it; it comes back by itself."""
    keys = [b"k%d" % number for number in range(30)]
    assert put(store, keys) == [Status.OK] * 30
    theirs = [cluster.master_of(slot_of(key)) == 1 for key in keys]
    cluster.nodes[1].freeze()
    try:
        started_s = time.monotonic()
        statuses = get(store, keys, s=0.6)
        assert time.monotonic() - started_s < 0.85
        assert statuses == [Status.TIMED_OUT if frozen else Status.OK for frozen in theirs]
        started_s = time.monotonic()
        statuses = get(store, keys, s=5)
        assert time.monotonic() - started_s < 0.3, "it waits for a node that is known to be silent"
        assert statuses == [Status.FAILED if frozen else Status.OK for frozen in theirs]
        health = store.health(within(5))
        assert health.ok and list(health.details.values()) == ["does not answer"]
    finally:
        cluster.nodes[1].resume()
    end_s = time.monotonic() + 10
    while get(store, keys) != [Status.OK] * 30:
        assert time.monotonic() < end_s, "it does not come back"
        time.sleep(0.1)


def test_keys_that_have_moved_are_found_in_the_same_call(
    cluster: RedisCluster, store: RemoteConnector
) -> None:
    keys = [b"k%d" % number for number in range(20)]
    assert put(store, keys) == [Status.OK] * 20
    for key in keys[:5]:
        target = moved_to(cluster, key)
        source = cluster.begin_move(slot_of(key), target)
        assert cluster.move_keys(slot_of(key), source, target) == 2
        cluster.end_move(slot_of(key), source, target)
    assert get(store, keys) == [Status.OK] * 20
    for key in keys[5:10]:
        target = moved_to(cluster, key)
        source = cluster.begin_move(slot_of(key), target)
        cluster.move_keys(slot_of(key), source, target)
        cluster.end_move(slot_of(key), source, target)
    assert store.exists(keys, within(5)) == [Status.OK] * 20
    assert store.delete(keys[:10], within(5)) == [Status.OK] * 10
    assert put(store, keys[:10]) == [Status.OK] * 10


@pytest.mark.parametrize("gone", [0, 1, 2, 3, 4])
def test_a_slot_on_its_way_is_never_a_false_miss(
    cluster: RedisCluster, store: RemoteConnector, gone: int
) -> None:
    """``gone`` of a value's four names (head and three pieces) are at the new node already."""
    key, other = b"way-%d" % gone, b"stays"
    assert put(store, [key, other], SIZE) == [Status.OK, Status.OK]
    target = moved_to(cluster, key)
    source = cluster.begin_move(slot_of(key), target)
    try:
        assert cluster.move_keys(slot_of(key), source, target, gone) == gone
        statuses = get(store, [key, other, b"absent"], SIZE)
        assert statuses[1:] == [Status.OK, Status.MISS]
        assert statuses[0] in (
            {0: [Status.OK], 4: [Status.OK]}.get(gone) or [Status.OK, Status.FAILED]
        )
        assert store.exists([key], within(5)) in ([Status.OK], [Status.FAILED])
        put_there = put(store, [key, other], SIZE)
        assert put_there[0] in (Status.OK, Status.FAILED) and put_there[1] is Status.OK
    finally:
        cluster.move_keys(slot_of(key), source, target)
        cluster.end_move(slot_of(key), source, target)
    assert get(store, [key, other], SIZE) == [Status.OK, Status.OK]


@pytest.mark.slow
def test_slots_that_move_all_the_time_under_readers_and_writers(
    cluster: RedisCluster, store: RemoteConnector
) -> None:
    """Every get gives the whole value or says that it could not; never a miss, never a mix."""
    keys = [b"busy-%d" % number for number in range(8)]
    assert put(store, keys, SIZE) == [Status.OK] * 8
    end_s = time.monotonic() + 6
    seen: set[Status] = set()
    failures: list[BaseException] = []

    def act() -> None:
        mine = open_url(f"{cluster.url}?piece_bytes={MIB}")
        try:
            while time.monotonic() < end_s:
                seen.update(get(mine, keys, SIZE))
                put(mine, keys[:2], SIZE)
        except BaseException as error:
            failures.append(error)
        finally:
            mine.close()

    threads = [threading.Thread(target=act) for _ in range(3)]
    [thread.start() for thread in threads]
    moves = 0
    while time.monotonic() < end_s:
        key = keys[moves % len(keys)]
        target = moved_to(cluster, key)
        source = cluster.begin_move(slot_of(key), target)
        while cluster.move_keys(slot_of(key), source, target, 1):
            time.sleep(0.005)
        # A writer may have added names since.
        cluster.move_keys(slot_of(key), source, target)
        cluster.end_move(slot_of(key), source, target)
        moves += 1
    [thread.join() for thread in threads]
    assert not failures, failures
    assert moves > 3 and Status.OK in seen
    assert seen <= {Status.OK, Status.FAILED}, seen
    end_s = time.monotonic() + 5
    while get(store, keys, SIZE) != [Status.OK] * 8:
        assert time.monotonic() < end_s


def test_a_full_node_rejects_its_keys_alone() -> None:
    full = ("--maxmemory", "24mb", "--maxmemory-policy", "noeviction")
    with RedisCluster(replica=False, arguments=full) as cluster:
        store = open_url(f"{cluster.url}?piece_bytes={MIB}")
        theirs, others = keys_of_node(cluster, 0, 16), keys_of_node(cluster, 1, 2)
        statuses = put(store, [others[0], *theirs, others[1]], 2 * MIB)
        assert statuses[0] is statuses[-1] is Status.OK
        assert set(statuses[1:-1]) == {Status.OK, Status.REJECTED}
        assert get(store, theirs, 2 * MIB) == [
            Status.OK if status is Status.OK else Status.MISS for status in statuses[1:-1]
        ]
        store.close()


def test_a_failover_in_the_middle_of_batches() -> None:
    """Calls go on without the dead node's keys, and with them once its replica took over."""
    with RedisCluster() as cluster:
        store = open_url(f"{cluster.url}?piece_bytes={MIB}")
        keys = [b"k%d" % number for number in range(60)]
        theirs = {key for key in keys if cluster.master_of(slot_of(key)) == 0}
        assert put(store, keys) == [Status.OK] * 60
        killed_s = 0.0
        longest_s = 0.0
        begun_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            if not killed_s and now_s - begun_s > 0.5:
                killer = threading.Timer(0.005, cluster.nodes[0].kill)
                killer.start()
                killed_s = now_s
            statuses = dict(zip(keys, get(store, keys, s=3)))
            stored = dict(zip(keys, put(store, keys, s=3)))
            longest_s = max(longest_s, time.monotonic() - now_s)
            for answers in (statuses, stored):
                assert all(answers[key] is Status.OK for key in keys if key not in theirs)
                assert set(answers.values()) <= {Status.OK, Status.FAILED, Status.MISS}
            if killed_s and now_s - killed_s > 1 and set(stored.values()) == {Status.OK}:
                break
            assert now_s - begun_s < 30, "the replica's keys are not found"
        assert set(get(store, keys)) == {Status.OK}
        assert longest_s < 1.5, "a call waited for the failover"
        store.close()


def test_a_cluster_that_is_gone_is_unavailable() -> None:
    with RedisCluster(replica=False) as cluster:
        store = open_url(cluster.url)
        assert put(store, [b"k"]) == [Status.OK]
        for node in cluster.nodes:
            node.kill()
        for _ in range(3):
            with pytest.raises(BackendUnavailable):
                get(store, [b"k"])
            with pytest.raises(BackendUnavailable):
                store.exists([b"k"], within(5))
        assert not store.health(within(5)).ok
        store.close()
        with pytest.raises(BackendUnavailable, match="no node of the cluster answers"):
            open_url(cluster.url)


def test_one_kind_taken_for_the_other(cluster: RedisCluster) -> None:
    with pytest.raises(ConfigError, match=r"redis\+cluster://"):
        open_url(cluster.nodes[0].url)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis+cluster://", "no host:port"),
        ("redis+cluster://a:1,b:x", "no host:port"),
        ("redis+cluster://a:1/3", "one database only"),
        ("redis+cluster://a:1?db=3", "option db is for unix://"),
        ("redis+sentinel://a:1", "names no master"),
        ("redis://a:1?tls=true", "option tls is for"),
        ("redis+cluster://a:1?sentinel_password=x", "is for redis.sentinel://"),
    ],
)
def test_urls_that_name_no_fleet(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_url(url)


def test_a_user_with_just_the_rights_of_the_readme(
    cluster: RedisCluster, store: RemoteConnector
) -> None:
    rights = (
        "+@connection +@transaction +get +set +exists +unlink +scan +info +object|idletime "
        "+pexpire +persist +cluster|slots +asking"
    )
    for node in range(3):
        words = ["kv", "on", ">s/e:c@ret", "resetkeys", "~lmc:*", "-@all", *rights.split()]
        cluster.client(node).execute_command("ACL SETUSER", *words)
    places = cluster.url.partition("://")[2]
    mine = open_url(f"redis+cluster://kv:s%2Fe%3Ac%40ret@{places}")
    assert put(mine, [b"a", b"b", b"c"]) == [Status.OK] * 3
    assert get(mine, [b"a", b"b", b"c"]) == [Status.OK] * 3
    mine.close()
    with pytest.raises(ConfigError, match="refuses the login") as caught:
        open_url(f"redis+cluster://kv:wrong-secret@{places}")
    assert "wrong-secret" not in str(caught.value)
