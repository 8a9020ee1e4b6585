"""``nixl+ucx://`` between real processes: bytes, refusals, and peers that die or stand still."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from channel_support import MIB, TOKEN, Arena, Side, far, side, within
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_backend_nixl.channel_plugin import plugin
from lmcache_backend_nixl.channel_wire import Identity, Malformed, read_ticket
from lmcache_core.sdk import (
    Access,
    BackendClosed,
    BackendUnavailable,
    ConfigError,
    ContractViolation,
    Grant,
    PeerRefused,
    Piece,
    Status,
)

OK, REJECTED, ABANDONED, FAILED = Status.OK, Status.REJECTED, Status.ABANDONED, Status.FAILED
TCP = {"environment": {"UCX_TLS": "tcp"}}
"""UCX then needs the other side's processor: a transfer to a frozen one stays in flight."""


class Pair:
    """``near`` initiates, ``other`` owns; each knows the other's name for it."""

    def __init__(self, near: Any, other: Any) -> None:
        self.near, self.other = near, other
        self.peer: str = near.connect(other.metadata())
        hello = os.urandom(8)
        assert near.notify(self.peer, hello) is OK
        end_s = time.monotonic() + 5
        while not (notes := other.told()[0]) or notes[-1][1] != hello:
            assert time.monotonic() < end_s
            time.sleep(0.002)
        self.us: str = notes[-1][0]

    def grant(self, spans: list[tuple[int, int]], access: str, lease_s: float = 60.0) -> Any:
        return self.other.grant(self.us, spans, access, lease_s)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with far() as other, side() as near:
        yield Pair(near, other)


@pytest.fixture
def tcp() -> Iterator[Pair]:
    with far(**TCP) as other, far(**TCP) as near:
        yield Pair(near, other)


def until(what: Any, seconds: float = 5.0) -> bool:
    end_s = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.01)
    return True


pieces = st.lists(st.integers(1, 4 * MIB), min_size=1, max_size=3)


@given(sizes=pieces, seed=st.integers(0, 1 << 30))
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_bytes_arrive_whole_both_ways(pair: Pair, sizes: list[int], seed: int) -> None:
    data = random.Random(seed).randbytes(sum(sizes))
    pair.near.fill(0, data)
    pair.other.fill(0, bytes(16 * MIB))
    spans, rows, at = [], [], 0
    for number, size in enumerate(sizes):
        spans.append((at + number, size))
        rows.append((at, size, number, 0))
        at += size
    grant = pair.grant(spans, "write")
    assert pair.near.move("write", pair.peer, grant.ticket, rows) == [OK] * len(sizes)
    for (near_at, size, _, _), (far_at, _) in zip(rows, spans):
        assert pair.other.bytes_at(far_at, size) == data[near_at : near_at + size]
        # The gaps are nobody's.
        assert pair.other.bytes_at(far_at + size, 1) == b"\0"
    assert pair.other.revoke(grant) is OK
    pair.near.fill(0, bytes(at))
    grant = pair.grant(spans, "read")
    assert pair.near.move("read", pair.peer, grant.ticket, rows) == [OK] * len(sizes)
    assert pair.near.bytes_at(0, at) == data
    assert pair.other.revoke(grant) is OK


def test_a_notification_comes_after_the_bytes(pair: Pair) -> None:
    grant = pair.grant([(0, 4 * MIB)], "write")
    pair.other.watch(4 * MIB - 16, 4 * MIB)
    for turn in range(20):
        pair.near.fill(0, bytes([turn + 1]) * 4 * MIB)
        note = b"turn %d" % turn
        assert pair.near.move(
            "write", pair.peer, grant.ticket, [(0, 4 * MIB, 0, 0)], notification=note
        ) == [OK]
        assert until(lambda note=note: pair.other.told()[0][-1][1] == note)
        assert pair.other.told()[1][-1] == bytes([turn + 1]) * 16
    pair.other.revoke(grant)


def test_a_read_tells_the_owner_too(pair: Pair) -> None:
    grant = pair.grant([(0, 10)], "read")
    rows = [(0, 10, 0, 0)]
    assert pair.near.move("read", pair.peer, grant.ticket, rows, notification=b"taken") == [OK]
    assert until(lambda: pair.other.told()[0][-1][1] == b"taken")
    pair.other.revoke(grant)


@pytest.mark.parametrize(
    "row",
    [(0, 101, 0, 0), (0, 1, 0, 100), (0, 10, 0, 91), (0, 1, 1, 0), (0, 1, -1, 0), (0, 1, 0, -1),
     (0, 1, 0, 1 << 64)],
)  # fmt: skip
def test_outside_of_a_span_is_rejected(pair: Pair, row: tuple[int, int, int, int]) -> None:
    pair.other.fill(0, bytes(4096))
    pair.near.fill(0, b"x" * 4096)
    grant = pair.grant([(1000, 100)], "write")
    good = (0, 4, 0, 0)
    answers = pair.near.move("write", pair.peer, grant.ticket, [row, good], notification=b"bad")
    assert answers == [REJECTED, OK]
    assert pair.other.bytes_at(0, 4096) == bytes(1000) + b"xxxx" + bytes(4096 - 1004)
    assert pair.other.told()[0][-1][1] != b"bad"
    pair.other.revoke(grant)


def test_wrong_access_expired_and_revoked_are_rejected(pair: Pair) -> None:
    pair.other.fill(0, b"a" * 100)
    pair.near.fill(0, b"b" * 100)
    rows = [(0, 100, 0, 0)]
    reads, writes = pair.grant([(0, 100)], "read"), pair.grant([(0, 100)], "write")
    short = pair.grant([(0, 100)], "write", lease_s=0.05)
    time.sleep(0.06)
    assert pair.near.move("write", pair.peer, reads.ticket, rows) == [REJECTED]
    assert pair.near.move("read", pair.peer, writes.ticket, rows) == [REJECTED]
    assert pair.near.move("write", pair.peer, short.ticket, rows) == [REJECTED]
    for grant in (reads, writes, short):
        assert pair.other.revoke(grant) is OK
        assert pair.other.revoke(grant) is OK
    assert pair.near.move("write", pair.peer, writes.ticket, rows) == [REJECTED]
    assert pair.near.move("read", pair.peer, reads.ticket, rows) == [REJECTED]
    assert pair.other.bytes_at(0, 100) == b"a" * 100
    assert pair.near.bytes_at(0, 100) == b"b" * 100


def test_a_lease_without_an_end_works(pair: Pair) -> None:
    grant = pair.grant([(0, 100)], "write", lease_s=float("inf"))
    assert pair.near.move("write", pair.peer, grant.ticket, [(0, 1, 0, 0)]) == [OK]
    assert pair.other.revoke(grant) is OK
    assert pair.near.move("write", pair.peer, grant.ticket, [(0, 1, 0, 0)]) == [REJECTED]


def test_a_ticket_is_worth_nothing_to_another_peer(pair: Pair) -> None:
    with side() as third:
        peer = third.connect(pair.other.metadata())
        grant = pair.grant([(0, 100)], "write")
        assert third.move("write", peer, grant.ticket, [(0, 1, 0, 0)]) == [REJECTED]
        assert pair.near.move("write", pair.peer, grant.ticket, [(0, 1, 0, 0)]) == [OK]
        pair.other.revoke(grant)


@given(data=st.data())
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_other_bytes_are_no_ticket(pair: Pair, data: st.DataObject) -> None:
    if not hasattr(pair, "kept"):
        pair.kept = pair.grant([(0, 100)], "write")  # type: ignore[attr-defined]
    ticket = pair.kept.ticket  # type: ignore[attr-defined]
    if data.draw(st.booleans()):
        wrong = bytearray(ticket)
        at = data.draw(st.integers(0, len(ticket) - 1))
        wrong[at] ^= data.draw(st.integers(1, 255))
        other = bytes(wrong)
    else:
        other = data.draw(st.binary(max_size=200))
    assert pair.near.move("write", pair.peer, other, [(0, 1, 0, 0)]) == [REJECTED]


@given(data=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        read_ticket(TOKEN, bytes(16), data)
    try:
        Identity.read(data)
    except Malformed:
        pass


def test_a_wrong_token_is_refused() -> None:
    with side() as one, side(token=b"another token of 32 bytes......!") as two:
        with pytest.raises(PeerRefused) as refused:
            two.connect(one.metadata())
        assert refused.value.reason == "token"


def test_what_can_not_be_reached() -> None:
    with side() as one:
        for metadata in (b"", b"tcp://127.0.0.1:1", b"\xff\xfe", b"nixl+ucx://127.0.0.1"):
            with pytest.raises(ConfigError):
                one.connect(metadata)
        with pytest.raises(BackendUnavailable):
            one.connect(b"nixl+ucx://127.0.0.1:1", 1)
        with pytest.raises(BackendUnavailable):
            one.connect(one.metadata())
        with pytest.raises(BackendUnavailable):
            one.grant("nobody", [(0, 1)], "read")
        assert one.move("write", "nobody", b"", [(0, 1, 0, 0)]) == [FAILED]
        assert one.notify("nobody", b"") is FAILED
        one.channel.disconnect("nobody")


def test_max_peers() -> None:
    with side(max_peers=1) as one, side() as two, side() as three:
        two.connect(one.metadata())
        with pytest.raises(PeerRefused) as refused:
            three.connect(one.metadata())
        assert refused.value.reason == "full"
        with pytest.raises(PeerRefused):
            one.connect(three.metadata())


def test_two_channels_in_one_process() -> None:
    with side() as near, side() as other:
        pair = Pair(near, other)
        near.fill(0, b"z" * MIB)
        grant = pair.grant([(MIB, MIB)], "write")
        assert near.move("write", pair.peer, grant.ticket, [(0, MIB, 0, 0)]) == [OK]
        assert other.bytes_at(MIB, MIB) == b"z" * MIB
        # A connection serves both directions.
        back = near.grant(pair.peer, [(0, MIB)], "read")
        assert other.move("read", pair.us, back.ticket, [(2 * MIB, MIB, 0, 0)]) == [OK]
        assert other.bytes_at(2 * MIB, MIB) == b"z" * MIB


def test_broken_calls_raise_and_touch_nothing(pair: Pair) -> None:
    grant = pair.grant([(0, 2 * MIB)], "read")
    channel, alien = pair.near.channel, Arena(4096, region_id=9)
    big = bytes(channel.capabilities.max_message_bytes + 1)
    with pytest.raises(ContractViolation):
        channel.read(pair.peer, grant.ticket, [Piece(alien.buffer(0, 1), 0)], within(1))
    with pytest.raises(ContractViolation):
        pair.near.move("read", pair.peer, grant.ticket, [(0, 2, 0, 0), (1, 2, 0, 0)])
    with pytest.raises(ContractViolation):
        pair.near.move("read", pair.peer, grant.ticket, [(0, 2, 0, 0)], notification=big)
    with pytest.raises(ContractViolation):
        rows = [(at, 1, 0, 0) for at in range(channel.capabilities.max_pieces + 1)]
        pair.near.move("read", pair.peer, grant.ticket, rows)
    with pytest.raises(ContractViolation):
        channel.grant(pair.peer, [alien.buffer(0, 1)], access=Access.READ, lease_s=1)
    assert pair.near.notify(pair.peer, big) is REJECTED
    assert pair.near.move("read", pair.peer, grant.ticket, [(0, 1, 0, 0)], seconds=-1) == [
        Status.TIMED_OUT
    ]
    pair.other.revoke(grant)


def test_a_region_that_comes_later() -> None:
    with side() as near, side() as other:
        pair = Pair(near, other)
        for turn in range(3):
            late = Arena(MIB, region_id=7)
            other.channel.register(late.region)
            grant = other.channel.grant(
                pair.us, [late.buffer(0, MIB)], access=Access.WRITE, lease_s=60
            )
            near.fill(0, bytes([turn + 1]) * MIB)
            assert near.move("write", pair.peer, grant.ticket, [(0, MIB, 0, 0)]) == [OK]
            assert bytes(late.view) == bytes([turn + 1]) * MIB
            assert other.revoke(grant) is OK
            other.channel.unregister(late.region)


def test_many_transfers_leave_nothing_behind(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = pair.near.channel._agent
    handles: list[Any] = []
    start, release = agent.start, agent.release

    def counted(*args: Any) -> Any:
        handle, state = start(*args)
        handles.append(handle)
        return handle, state

    def given_back(handle: Any) -> None:
        handles.remove(handle)
        release(handle)

    monkeypatch.setattr(agent, "start", counted)
    monkeypatch.setattr(agent, "release", given_back)
    before = None
    for turn in range(1000):
        grant = pair.grant([(0, 4096)], "write")
        rows = [(0, 4096, 0, 0)]
        assert pair.near.move("write", pair.peer, grant.ticket, rows) == [OK]
        assert pair.other.revoke(grant) is OK
        if turn == 10:
            before = len(os.listdir("/proc/self/fd")), threading.active_count()
    assert not handles
    assert before == (len(os.listdir("/proc/self/fd")), threading.active_count())
    assert not pair.near.channel._transfers._known and not pair.near.channel._transfers._live


def test_disconnect_ends_grants_and_is_told(pair: Pair) -> None:
    with side() as near:
        own = Pair(near, pair.other)
        losses = len(pair.other.told()[2])
        grant, back = own.grant([(0, 10)], "write"), near.grant(own.peer, [(0, 10)], "read")
        near.channel.disconnect(own.peer)
        assert until(lambda: len(pair.other.told()[2]) == losses + 1)
        assert pair.other.told()[2][-1][0] == own.us
        assert pair.other.revoke(grant) is OK
        assert near.revoke(back) is OK
        assert not near.losses
        assert near.move("write", own.peer, grant.ticket, [(0, 1, 0, 0)]) == [FAILED]
        again = Pair(near, pair.other)
        assert near.move("write", again.peer, grant.ticket, [(0, 1, 0, 0)]) == [REJECTED]


def test_peers_that_come_back_cost_nothing() -> None:
    with side() as near, side() as other:
        counts: list[int] = []
        for _ in range(12):
            own = Pair(near, other)
            grant = own.grant([(0, 10)], "write")
            assert near.move("write", own.peer, grant.ticket, [(0, 10, 0, 0)]) == [OK]
            near.channel.disconnect(own.peer)
            assert other.revoke(grant) is OK
            time.sleep(0.1)
            counts.append(len(os.listdir("/proc/self/fd")))
        assert counts[-1] <= counts[2]


def test_quiesce_ends_every_grant(pair: Pair) -> None:
    with side() as near:
        own = Pair(near, pair.other)
        grants = [near.grant(own.peer, [(at, 10)], "write") for at in range(5)]
        assert near.channel.quiesce(own.peer, within(5)) is OK
        for grant in grants:
            rows = [(0, 1, 0, 0)]
            assert pair.other.move("write", own.us, grant.ticket, rows) == [REJECTED]
            assert near.revoke(grant) is OK


def test_a_peer_that_is_killed() -> None:
    with far() as other, side() as near:
        pair = Pair(near, other)
        mine = near.grant(pair.peer, [(0, MIB)], "write")
        theirs = pair.grant([(0, MIB)], "write")
        other.kill()
        start_s = time.monotonic()
        answers = near.move("write", pair.peer, theirs.ticket, [(0, MIB, 0, 0)], seconds=2)
        assert time.monotonic() - start_s < 3
        assert answers in ([FAILED], [ABANDONED], [OK])
        assert until(lambda: near.losses)
        assert [peer for peer, _ in near.losses] == [pair.peer]
        assert near.revoke(mine) is OK
        assert near.notify(pair.peer, b"x") is FAILED
        assert near.move("write", pair.peer, theirs.ticket, [(0, MIB, 0, 0)]) == [FAILED]


def test_killed_in_the_middle(tcp: Pair) -> None:
    grant = tcp.grant([(0, 8 * MIB)], "write")
    tcp.other.freeze()
    number = tcp.near.begin("write", tcp.peer, grant.ticket, [(0, 8 * MIB, 0, 0)], seconds=8)
    time.sleep(0.1)
    assert tcp.near.poll(number) is None
    tcp.other.kill()
    start_s = time.monotonic()
    answers = tcp.near.wait(number, 9)
    assert time.monotonic() - start_s < 9
    assert answers in ([FAILED], [ABANDONED])
    assert until(lambda: tcp.near.told()[2])
    if answers == [ABANDONED]:
        assert until(lambda: tcp.near.told()[3] == [1], 10)


def test_a_frozen_owner_costs_a_deadline(tcp: Pair) -> None:
    tcp.near.fill(0, b"q" * MIB)
    grant = tcp.grant([(0, MIB), (MIB, MIB)], "write")
    tcp.other.freeze()
    rows = [(0, MIB, 0, 0), (MIB, MIB, 1, 0)]
    start_s = time.monotonic()
    answers = tcp.near.move("write", tcp.peer, grant.ticket, rows, seconds=0.5)
    assert 0.4 < time.monotonic() - start_s < 1.0
    assert answers == [ABANDONED] * 2
    number = tcp.near.begin("write", tcp.peer, grant.ticket, rows, seconds=5)
    tcp.near.cancel(number)
    assert tcp.near.wait(number, 1) == [ABANDONED] * 2
    assert tcp.near.told()[3] == []
    tcp.other.thaw()
    assert until(lambda: sorted(tcp.near.told()[3]) == [1, 1, MIB + 1, MIB + 1], 10)
    assert tcp.other.revoke(grant) is OK


def test_no_more_than_max_transfers() -> None:
    with far(**TCP) as other, far(max_transfers=2, **TCP) as near:
        pair = Pair(near, other)
        grant = pair.grant([(0, MIB)], "write")
        other.freeze()
        rows = [(0, MIB, 0, 0)]
        for _ in range(2):
            assert near.move("write", pair.peer, grant.ticket, rows, seconds=0.1) == [ABANDONED]
        # Those that were left behind still count.
        assert near.move("write", pair.peer, grant.ticket, rows, seconds=0.1) == [REJECTED]
        other.thaw()
        assert until(lambda: len(near.told()[3]) == 2, 10)
        assert near.move("write", pair.peer, grant.ticket, rows) == [OK]


def test_over_tcp_the_bytes_are_the_same(tcp: Pair) -> None:
    data = os.urandom(5 * MIB)
    tcp.near.fill(0, data)
    grant = tcp.grant([(0, 5 * MIB)], "write")
    assert tcp.near.move("write", tcp.peer, grant.ticket, [(0, 5 * MIB, 0, 0)]) == [OK]
    assert tcp.other.bytes_at(0, 5 * MIB) == data


def test_a_frozen_initiator_keeps_the_memory() -> None:
    with far() as other, side() as near:
        pair = Pair(near, other)
        grant = near.grant(pair.peer, [(0, 10), (100, 10)], "write")
        other.freeze()
        start_s = time.monotonic()
        assert near.revoke(grant, 0.3) is ABANDONED
        assert near.channel.quiesce(pair.peer, within(0.3)) is ABANDONED
        assert time.monotonic() - start_s < 1.0
        assert near.released == []
        other.thaw()
        assert until(lambda: sorted(near.released) == [1, 101])
        assert near.revoke(grant, 0.3) is OK


def test_a_frozen_initiator_that_dies() -> None:
    with far() as other, side() as near:
        pair = Pair(near, other)
        grant = near.grant(pair.peer, [(0, 10)], "write")
        other.freeze()
        assert near.revoke(grant, 0.1) is ABANDONED
        other.kill()
        assert until(lambda: near.released == [1])


@pytest.mark.parametrize("environment", [{}, TCP["environment"]])
def test_close_does_not_wait_for_a_frozen_peer(environment: dict[str, str]) -> None:
    with far(environment=environment) as other, far(environment=environment) as near:
        pair = Pair(near, other)
        grant = pair.grant([(0, MIB)], "write")
        near.grant(pair.peer, [(0, 10)], "write")
        other.freeze()
        near.begin("write", pair.peer, grant.ticket, [(0, MIB, 0, 0)], seconds=30)
        start_s = time.monotonic()
        near.close()
        assert time.monotonic() - start_s < 5
        with pytest.raises(RuntimeError, match="BackendClosed"):
            near.metadata()


def test_after_close_and_after_fork() -> None:
    near = Side()
    child = os.fork()
    if not child:
        code = 1
        try:
            near.channel.metadata()
        except BackendClosed:
            near.channel.close()
            code = 0
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    near.channel.metadata()
    near.channel.close()
    near.channel.close()
    context = within(1)
    for call in (
        lambda: near.channel.metadata(),
        lambda: near.channel.register(near.arena.region),
        lambda: near.channel.connect(b"", context),
        lambda: near.channel.notify("x", b""),
        lambda: near.channel.poll(1),
        lambda: near.channel.cancel(1),
        lambda: near.channel.write("x", b"", [], context),
        lambda: near.channel.read("x", b"", [], context),
        lambda: near.channel.revoke(Grant(1, b""), context),
        lambda: near.channel.quiesce("x", context),
        lambda: near.channel.disconnect("x"),
    ):
        with pytest.raises(BackendClosed):
            call()


def test_who_is_dead() -> None:
    us = Identity.of_this_process("a")
    assert not us.surely_dead(us)
    child = os.fork()
    if not child:
        os._exit(0)
    them = Identity("b", us.boot, us.pid_space, child, us.started)
    assert them.surely_dead(us)  # another was started at that time, or it is a zombie
    os.waitpid(child, 0)
    assert them.surely_dead(us)
    assert not Identity("b", "elsewhere", us.pid_space, child, 1).surely_dead(us)
    assert not Identity("b", us.boot, "pid:[1]", child, 1).surely_dead(us)


def test_an_idle_channel_costs_nothing() -> None:
    with far() as other, side() as near:
        Pair(near, other)
        time.sleep(0.1)
        start_s = time.process_time()
        time.sleep(1.0)
        assert time.process_time() - start_s < 0.03


def test_the_probe_knows_the_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    assert plugin.probe().usable
    monkeypatch.setenv("NIXL_PLUGIN_DIR", str(tmp_path))
    assert not plugin.probe().usable and "cu12" in plugin.probe().hint


def test_wrong_options_and_addresses() -> None:
    with pytest.raises(ConfigError):
        Side(max_peers=0)
    near = Side()
    try:
        options = {spec.name: spec.default for spec in plugin.options}
        taken = near.metadata().decode()
        with pytest.raises(BackendUnavailable):
            plugin.open(taken, options, near.host)
        with pytest.raises(ConfigError):
            plugin.open("nixl+ucx://host/path", options, near.host)
    finally:
        near.channel.close()


@pytest.mark.slow
def test_a_busy_hour_in_short() -> None:
    """Threads that write, read, revoke and register at the same time."""
    with side() as near, side() as other:
        own = Pair(near, other)
        failures: list[Any] = []

        def work(number: int) -> None:
            base = number * MIB
            try:
                for turn in range(200):
                    data = bytes([turn % 250 + 1, number + 1]) * 2048
                    near.fill(base, data)
                    grant = own.grant([(base, 4096)], "write")
                    rows = [(base, 4096, 0, 0)]
                    assert near.move("write", own.peer, grant.ticket, rows) == [OK]
                    assert other.bytes_at(base, 4096) == data
                    assert other.revoke(grant) is OK
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for turn in range(20):
            late = Arena(4096, region_id=50 + turn)
            other.channel.register(late.region)
            time.sleep(0.01)
            other.channel.unregister(late.region)
        for thread in threads:
            thread.join(60)
        assert not failures
