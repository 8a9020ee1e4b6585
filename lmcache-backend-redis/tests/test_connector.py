"""What the conformance suite can't know: this server's ways to fail, and the layout."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import redis
from redis_support import Open, connect, get, put

from lmcache_backend_redis.layout import Head, head_name
from lmcache_backend_redis.server import RedisServer
from lmcache_conformance import FaultProxy, Memory, value, within
from lmcache_core import plugins
from lmcache_core.metrics import Metrics
from lmcache_core.opening import _services
from lmcache_core.sdk import BackendUnavailable, ConfigError, Durability, Status

MIB = 1 << 20


def admin(server: RedisServer) -> redis.Redis:
    return redis.Redis(unix_socket_path=str(server.socket_path))


def open_url(url: str) -> object:
    """As an engine opens it."""
    services = _services(None, _Runtime(), Metrics(), lambda token: None)  # type: ignore[arg-type]
    return plugins.open_connector(url, services)


class _Runtime:
    now_s = staticmethod(time.monotonic)


def test_a_value_lies_in_a_head_and_pieces(shared_server: RedisServer, opened: Open) -> None:
    store, raw = opened(shared_server.url, piece_bytes=MIB), admin(shared_server)
    content = value(1, 5 * MIB // 2)
    assert put(store, b"\0key", content) is Status.OK
    head = Head.decode(raw.get("lmc:{006b6579}"))
    assert head is not None and (head.nbytes, head.pieces) == (len(content), 3)
    pieces = [raw.get(name) for name in head.names(b"\0key")]
    assert b"".join(pieces) == content
    assert all(raw.ttl(name) == -1 for name in [b"lmc:{006b6579}", *head.names(b"\0key")])
    assert head.names(b"\0key")[2] == b"lmc:{006b6579}:%b:2" % head.version.hex().encode()


@pytest.mark.parametrize("nbytes", [0, 1, 9, 10, MIB - 1, MIB, MIB + 1, 2 * MIB, 2 * MIB + 1])
@pytest.mark.parametrize("scheme", ["url", "unix_url"])
def test_sizes_around_a_piece(
    shared_server: RedisServer, opened: Open, nbytes: int, scheme: str
) -> None:
    store = opened(getattr(shared_server, scheme), piece_bytes=MIB)
    content = value(nbytes, nbytes)
    assert put(store, b"size", content) is Status.OK
    result, got = get(store, b"size", max(1, nbytes))
    assert (result, got) == ((Status.OK, nbytes), content)


def test_what_is_replaced_expires_and_what_is_deleted_goes(
    shared_server: RedisServer, opened: Open
) -> None:
    store, raw = opened(shared_server.url, longest_deadline_s=5), admin(shared_server)
    put(store, b"old", value(1, MIB))
    (before,) = [n for n in raw.keys("lmc:{6f6c64}:*")]
    put(store, b"old", value(2, MIB))
    assert 0 < raw.pttl(before) <= 10_000, "twice the longest deadline"
    assert get(store, b"old", MIB)[1] == value(2, MIB)
    store.delete([b"old"], within(5))
    assert raw.keys("lmc:{6f6c64}*") == [before]


def test_a_time_to_live(shared_server: RedisServer, opened: Open) -> None:
    store, raw = opened(shared_server.url, ttl_s=0.3), admin(shared_server)
    assert store.capabilities.evicts
    put(store, b"ttl", value(1, 100))
    assert get(store, b"ttl", 100)[0].status is Status.OK
    time.sleep(0.35)
    assert get(store, b"ttl", 100)[0].status is Status.MISS
    (piece,) = raw.keys("lmc:{74746c}:*")
    assert raw.pttl(piece) > 0, "pieces outlive their head, for readers that hold it"


def test_exists_of_128_keys_is_one_round_trip(shared_server: RedisServer, opened: Open) -> None:
    with FaultProxy(shared_server.socket_path) as proxy:
        store = opened(f"redis://127.0.0.1:{proxy.port}")
        keys = [b"k%d" % i for i in range(128)]
        put(store, keys[5], b"x")
        turns = proxy.turns
        answers = store.exists(keys, within(5))
        assert proxy.turns == turns + 1
        assert [i for i, status in enumerate(answers) if status is Status.OK] == [5]


@pytest.mark.parametrize(
    "damage", ["cut", "cut by a byte", "longer", "head", "foreign head", "piece count"]
)
def test_a_value_changed_behind_our_back_is_corrupt(
    shared_server: RedisServer, opened: Open, damage: str
) -> None:
    store, raw = opened(shared_server.url), admin(shared_server)
    key, name = b"changed", head_name(b"changed")
    put(store, key, value(1, 5000))
    put(store, b"neighbour", value(2, 5000))
    head = Head.decode(raw.get(name))
    assert head is not None
    (piece,) = head.names(key)
    if damage == "cut":
        raw.set(piece, value(1, 5000)[:4000])
    elif damage == "cut by a byte":
        raw.set(piece, value(1, 5000)[:4999])
    elif damage == "longer":
        raw.set(piece, value(1, 6000))
    elif damage == "piece count":
        raw.set(name, Head(head.version, 5000, 5001).encode())
    else:
        raw.set(name, head.encode()[:-1] if damage == "head" else b"somebody else's value")
    memory = Memory([8192, 8192])
    start = time.monotonic()
    results = store.get_into([key, b"neighbour"], memory.buffers(), within(5))
    assert results[0].status is Status.CORRUPT
    assert time.monotonic() - start < 1, "it waited for bytes that do not exist"
    assert (results[1], memory.bytes_of(1)[:5000]) == ((Status.OK, 5000), value(2, 5000))
    assert memory.canaries_intact()
    assert store.delete([key], within(5)) == [Status.OK]
    assert get(store, key, 8192)[0].status is Status.MISS


def test_a_piece_of_another_type_fails_alone(shared_server: RedisServer, opened: Open) -> None:
    store, raw = opened(shared_server.url), admin(shared_server)
    put(store, b"typed", value(1, 5000))
    put(store, b"neighbour", value(2, 5000))
    (piece,) = raw.keys("lmc:{7479706564}:*")
    raw.delete(piece)
    raw.lpush(piece, "a list")
    memory = Memory([8192, 8192])
    results = store.get_into([b"typed", b"neighbour"], memory.buffers(), within(5))
    assert [result.status for result in results] == [Status.FAILED, Status.OK]
    assert memory.bytes_of(1)[:5000] == value(2, 5000)


def test_a_piece_that_was_evicted_is_a_miss_and_takes_its_head_along(
    shared_server: RedisServer, opened: Open
) -> None:
    store, raw = opened(shared_server.url, piece_bytes=MIB), admin(shared_server)
    put(store, b"holed", value(1, 3 * MIB))
    raw.delete(sorted(raw.keys("lmc:{686f6c6564}:*"))[1])
    assert get(store, b"holed", 3 * MIB)[0].status is Status.MISS
    assert raw.keys("lmc:{686f6c6564}*") == []


def test_scan_lists_whole_values_with_sizes(server: RedisServer, opened: Open) -> None:
    store = opened(server.url, piece_bytes=MIB)
    sizes = {b"a%03d" % i: 10 + i for i in range(300)} | {b"b": 2 * MIB}
    for key, nbytes in sizes.items():
        put(store, key, value(0, nbytes))
    admin(server).set("lmc:{zz}", "no head of ours")
    assert {e.key: e.nbytes for e in store.scan(b"", within(10))} == sizes
    found = list(store.scan(b"a00", within(10)))
    assert sorted(e.key for e in found) == [b"a%03d" % i for i in range(10)]
    assert all(abs(e.used_at_s - time.time()) < 60 for e in found)


def test_a_restarted_server_costs_idle_connections_nothing(
    server: RedisServer, opened: Open
) -> None:
    store = opened(server.unix_url)
    put(store, b"k", value(1, 100))
    threads = [threading.Thread(target=store.exists, args=([b"k"], within(5))) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    server.kill()
    with pytest.raises(BackendUnavailable):
        store.exists([b"k"], within(1))
    server.start()
    assert store.exists([b"k"], within(5)) == [Status.MISS]
    assert put(store, b"k", value(1, 100)) is Status.OK


def test_a_server_killed_between_two_calls_is_unavailable_not_slow(
    server: RedisServer, opened: Open
) -> None:
    store = opened(server.url)
    put(store, b"k", value(1, 100))
    server.kill()
    start = time.monotonic()
    for call in (
        lambda: put(store, b"k", b"x"),
        lambda: get(store, b"k", 100),
        lambda: store.delete([b"k"], within(5)),
    ):
        with pytest.raises(BackendUnavailable) as caught:
            call()
        assert caught.value.retryable and caught.value.hint
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("op", ["exists", "get", "put", "delete"])
def test_a_frozen_server_costs_the_deadline(server: RedisServer, opened: Open, op: str) -> None:
    store = opened(server.url)
    put(store, b"k", value(1, 8 * MIB))
    server.freeze()
    start = time.monotonic()
    call = {
        "exists": lambda: store.exists([b"k"], within(0.3))[0],
        "get": lambda: get(store, b"k", 8 * MIB, 0.3)[0].status,
        "put": lambda: put(store, b"k", value(2, 8 * MIB), 0.3),
        "delete": lambda: store.delete([b"k"], within(0.3))[0],
    }[op]
    assert call() is Status.TIMED_OUT
    assert 0.3 <= time.monotonic() - start < 0.55
    server.resume()
    assert get(store, b"k", 8 * MIB)[0].status in (Status.OK, Status.MISS)
    assert put(store, b"k", value(3, 8 * MIB)) is Status.OK
    assert get(store, b"k", 8 * MIB)[1] == value(3, 8 * MIB)


def test_a_server_that_stops_in_the_middle_of_a_value(server: RedisServer, opened: Open) -> None:
    with FaultProxy(server.socket_path) as proxy:
        store = opened(f"redis://127.0.0.1:{proxy.port}", piece_bytes=MIB)
        put(store, b"k", value(1, 4 * MIB))
        proxy.faults.cut_reply_after_bytes = proxy.reply_bytes + 2 * MIB
        with pytest.raises(BackendUnavailable):
            get(store, b"k", 4 * MIB)
        proxy.faults.cut_reply_after_bytes = -1
        assert get(store, b"k", 4 * MIB)[1] == value(1, 4 * MIB)
        proxy.faults.bytes_per_s = 4e6
        memory = Memory([4 * MIB])
        start = time.monotonic()
        (result,) = store.get_into([b"k"], memory.buffers(), within(0.3))
        assert result.status is Status.TIMED_OUT
        assert time.monotonic() - start < 0.55
        assert memory.canaries_intact()


def test_a_full_server_rejects_and_keeps_no_piece(opened: Open) -> None:
    arguments = ("--maxmemory", "8mb", "--maxmemory-policy", "noeviction")
    with RedisServer(arguments=arguments) as server:
        store = opened(server.url, piece_bytes=MIB)
        assert not store.capabilities.evicts
        assert store.capabilities.capacity_reported
        answers = [put(store, b"k%d" % i, value(i, 2 * MIB)) for i in range(6)]
        assert set(answers) == {Status.OK, Status.REJECTED}
        full = answers.index(Status.REJECTED)
        raw = admin(server)
        assert raw.keys(head_name(b"k%d" % full) + b"*") == []
        for i in range(full):
            assert get(store, b"k%d" % i, 2 * MIB)[1] == value(i, 2 * MIB)
        health = store.health(within(5))
        assert health.used_bytes > 0 and health.total_bytes == 8 * MIB
        store.delete([b"k0"], within(5))
        assert put(store, b"again", value(9, 2 * MIB)) is Status.OK


def test_a_server_that_evicts_never_gives_a_mix(opened: Open) -> None:
    arguments = ("--maxmemory", "12mb", "--maxmemory-policy", "allkeys-lru")
    with RedisServer(arguments=arguments) as server:
        store = opened(server.url, piece_bytes=MIB)
        assert store.capabilities.evicts
        seen = set()
        for i in range(60):
            put(store, b"k%d" % (i % 10), value(i, 3 * MIB))
            result, got = get(store, b"k%d" % ((i * 7) % 10), 3 * MIB)
            seen.add(result.status)
            if result.status is Status.OK:
                assert any(got == value(j, 3 * MIB) for j in range((i * 7) % 10, 60, 10))
        assert seen == {Status.OK, Status.MISS}


def test_an_append_only_file_is_claimed_and_kept(tmp_path: Path, opened: Open) -> None:
    """Not with ``everysec``, which holds a write back while a sync runs."""
    with RedisServer(arguments=("--appendonly", "yes")) as server:
        assert opened(server.unix_url).capabilities.durability is Durability.PROCESS
    with RedisServer(arguments=("--appendonly", "yes", "--appendfsync", "always")) as server:
        store = opened(server.unix_url)
        assert store.capabilities.durability is Durability.SERVER
        for i in range(20):
            assert put(store, b"k%d" % i, value(i, 100_000)) is Status.OK
        server.kill()
        server.start()
        for i in range(20):
            assert get(store, b"k%d" % i, 100_000)[1] == value(i, 100_000)


def test_wrong_credentials_are_one_clear_error_without_the_secret() -> None:
    with RedisServer(arguments=("--requirepass", "right-secret")) as server:
        for url in (server.url, server.url.replace("//", "//:wrong-secret@")):
            with pytest.raises(ConfigError) as caught:
                open_url(url)
            assert "secret" not in str(caught.value)
            assert caught.value.hint
        store = open_url(server.url.replace("//", "//:right-secret@"))
        store.close()  # type: ignore[attr-defined]
        store = open_url(f"{server.unix_url}?password=right-secret")
        store.close()  # type: ignore[attr-defined]


RIGHTS = (
    "+@connection +@transaction +get +set +exists +unlink +scan +info +object|idletime "
    "+pexpire +persist ~lmc:*"
)


@pytest.mark.parametrize("rights", [RIGHTS, RIGHTS.replace("+info ", "")])
def test_the_rights_of_the_readme_are_enough(
    server: RedisServer, opened: Open, rights: str
) -> None:
    admin(server).execute_command("ACL", "SETUSER", "kv", "on", ">pw", *rights.split())
    store = opened(server.url.replace("//", "//kv:pw@"))
    assert store.capabilities.evicts is ("+info" not in rights)
    for i in range(3):
        assert put(store, b"k", value(i, 3 * MIB)) is Status.OK
    assert get(store, b"k", 3 * MIB)[1] == value(2, 3 * MIB)
    assert [e.key for e in store.scan(b"", within(5))] == [b"k"]
    assert store.health(within(5)).ok
    assert store.delete([b"k"], within(5)) == [Status.OK]
    assert get(store, b"k", MIB)[0].status is Status.MISS


def test_rights_that_are_taken_away_make_it_unavailable(server: RedisServer, opened: Open) -> None:
    admin(server).execute_command("ACL", "SETUSER", "kv", "on", ">pw", "+@all", "~*")
    store = opened(server.url.replace("//", "//kv:pw@"))
    admin(server).execute_command("ACL", "SETUSER", "kv", "-@all", "+@connection")
    for call in (
        lambda: store.exists([b"k"], within(1)),
        lambda: put(store, b"k", b"x"),
        lambda: get(store, b"k", 10),
        lambda: store.delete([b"k"], within(1)),
    ):
        with pytest.raises(BackendUnavailable):
            call()


def openssl(*args: object) -> None:
    subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, server.pem, server.key of a CA of our own."""
    base = tmp_path_factory.mktemp("tls")
    (base / "ext").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("ca", "other"):
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", 2, "-subj", f"/CN={name}",
                "-keyout", base / f"{name}.key", "-out", base / f"{name}.pem")  # fmt: skip
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1",
            "-keyout", base / "server.key", "-out", base / "server.csr")  # fmt: skip
    openssl("x509", "-req", "-in", base / "server.csr", "-CA", base / "ca.pem",
            "-CAkey", base / "ca.key", "-CAcreateserial", "-days", 2, "-extfile", base / "ext",
            "-out", base / "server.pem")  # fmt: skip
    return base


def test_tls(tls: Path, opened: Open) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (
        "--tls-port", str(port), "--tls-cert-file", str(tls / "server.pem"),
        "--tls-key-file", str(tls / "server.key"), "--tls-ca-cert-file", str(tls / "ca.pem"),
        "--tls-auth-clients", "no",
    )  # fmt: skip
    with RedisServer(arguments=arguments) as server:
        url = f"rediss://127.0.0.1:{port}"
        store = opened(url, {"ssl_ca_certs": str(tls / "ca.pem")}, piece_bytes=MIB)
        assert put(store, b"k", value(1, 5 * MIB)) is Status.OK
        assert get(store, b"k", 5 * MIB)[1] == value(1, 5 * MIB)
        assert store.exists([b"k", b"l"], within(5)) == [Status.OK, Status.MISS]
        server.freeze()
        start = time.monotonic()
        assert get(store, b"k", 5 * MIB, 0.3)[0].status is Status.TIMED_OUT
        assert put(store, b"k", value(2, 5 * MIB), 0.3) is Status.TIMED_OUT
        assert time.monotonic() - start < 1.1
        server.resume()
        with pytest.raises((BackendUnavailable, ConfigError)) as caught:
            open_url(f"{url}?ca_certs={tls / 'other.pem'}")
        assert "certificate" in str(caught.value).lower()
        open_url(f"{url}?ca_certs={tls / 'ca.pem'}").close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("piece_bytes=100", "out of range"), ("connections=0", "out of range"),
        ("ttl_s=-1", "out of range"), ("ca_certs=/x", "rediss"), ("password=hush", "unix"),
        ("piece_byte=1", "piece_bytes"),
    ],
)  # fmt: skip
def test_wrong_options(shared_server: RedisServer, query: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_url(f"{shared_server.url}?{query}")
    assert words in str(caught.value)
    assert "hush" not in str(caught.value)


def test_nobody_there_is_one_clear_error() -> None:
    with pytest.raises(BackendUnavailable) as caught:
        open_url("redis://127.0.0.1:1")
    assert "running" in caught.value.hint
    assert not plugins.probe_here("redis://127.0.0.1:1").usable
    for url in ("redis:///", "unix:///", "rediss://"):
        assert "no server asked" in plugins.probe_here(url).reason


def test_a_peer_that_does_not_speak_redis(opened: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(100)
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                time.sleep(0.2)

        threading.Thread(target=talk, daemon=True).start()
        with pytest.raises(BackendUnavailable, match="RESP"):
            connect(f"redis://127.0.0.1:{listener.getsockname()[1]}")


def test_closing_while_a_call_runs_ends_it_by_its_deadline(
    server: RedisServer, opened: Open
) -> None:
    store = opened(server.url)
    put(store, b"k", value(1, MIB))
    server.freeze()
    seen: list[Status] = []
    reader = threading.Thread(target=lambda: seen.append(get(store, b"k", MIB, 0.5)[0].status))
    reader.start()
    time.sleep(0.1)
    start = time.monotonic()
    store.close()
    assert time.monotonic() - start < 0.2
    reader.join(2)
    assert seen == [Status.TIMED_OUT]
    server.resume()
