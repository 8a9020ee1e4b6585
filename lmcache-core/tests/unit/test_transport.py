"""Chunks pushed from a prefiller to a decoder, and every way in which that ends early."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transport_rig import (
    LAYOUT,
    OURS,
    SLOT_BYTES,
    Node,
    begun,
    key,
    missing,
    nodes,
    soon_s,
    until,
)

from lmcache_core.config import EngineConfig
from lmcache_core.opening import open_chunks
from lmcache_core.sdk import Access, BackendUnavailable, ConfigError, OpContext, Piece, Status
from lmcache_core.transport import messages


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("token") / "token"
    file.touch(0o600)
    file.write_text(secrets.token_hex(32))
    return file


def test_chunks_arrive_as_they_are_computed(token: Path) -> None:
    with nodes(token) as (prefiller, decoder):
        expected, push = begun(prefiller, decoder, 4)
        for number in range(4):
            assert not expected.done
            prefiller.store(number)
            until(lambda n=number: decoder.holds(n), prefiller, decoder)
        until(lambda: expected.done, prefiller, decoder)
        assert expected.reason == ""
        assert expected.received_bytes == 4 * LAYOUT.payload_bytes
        assert push.pushed == 4
        prefiller.transport.pusher.computed(push)
        decoder.transport.receiver.release(expected)


def test_what_came_stays_until_it_is_released(token: Path) -> None:
    with nodes(token) as (prefiller, decoder):
        expected, push = begun(prefiller, decoder, 2)
        for number in range(2):
            prefiller.store(number)
        until(lambda: expected.done, prefiller, decoder)
        for number in range(100, 250):  # far more than fits
            chunk = decoder.engine.reserve_key(key(number), None, layout=LAYOUT)
            if chunk is not None:
                decoder.engine.commit([chunk])
        assert decoder.holds(0) and decoder.holds(1)
        decoder.transport.receiver.release(expected)
        prefiller.transport.pusher.computed(push)


def test_the_prefiller_may_speak_first(token: Path) -> None:
    with nodes(token) as (prefiller, decoder):
        prefiller.store(0)
        push = prefiller.transport.pusher.start("t", decoder.transport.address, deadline_s=soon_s())
        assert push is not None
        prefiller.transport.pusher.computed(push)
        until(lambda: push.peer, prefiller, decoder)
        time.sleep(0.05)
        decoder.engine.poll()
        expected = decoder.transport.receiver.expect("t", missing(1), deadline_s=soon_s())
        assert expected is not None
        until(lambda: expected.done, prefiller, decoder)
        assert decoder.holds(0) and expected.reason == ""
        decoder.transport.receiver.release(expected)


def test_only_what_the_decoder_lacks_is_sent(token: Path) -> None:
    with nodes(token) as (prefiller, decoder):
        decoder.store(0)
        for number in range(3):
            prefiller.store(number)
        expected, push = begun(prefiller, decoder, 3)
        until(lambda: expected.done, prefiller, decoder)
        assert expected.received_bytes == 2 * LAYOUT.payload_bytes
        prefiller.transport.pusher.computed(push)
        decoder.transport.receiver.release(expected)


def test_two_requests_wait_for_one_chunk(token: Path) -> None:
    with nodes(token) as (prefiller, decoder):
        first = decoder.transport.receiver.expect("a", missing(2), deadline_s=soon_s())
        second = decoder.transport.receiver.expect("b", missing(2), deadline_s=soon_s())
        assert first is not None and second is not None
        assert decoder.transport.receiver.expect("a", [], deadline_s=soon_s()) is None
        push = prefiller.transport.pusher.start("a", decoder.transport.address, deadline_s=soon_s())
        assert push is not None
        for number in range(2):
            prefiller.store(number)
        until(lambda: first.done and second.done, prefiller, decoder)
        assert second.received_bytes == 0 and second.reason == ""
        prefiller.transport.pusher.computed(push)
        for expected in (first, second):
            decoder.transport.receiver.release(expected)


def test_a_prefiller_that_ends_early_says_so(token: Path) -> None:
    with nodes(token) as (prefiller, decoder):
        expected, push = begun(prefiller, decoder, 3, 60)
        prefiller.store(0)
        prefiller.transport.pusher.computed(push)
        until(lambda: expected.done, prefiller, decoder)
        assert expected.reason == "not_computed"
        assert decoder.holds(0) and not decoder.holds(1)
        decoder.transport.receiver.release(expected)


def test_another_layout_is_refused_with_the_fields_that_differ(
    token: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prefiller = Node(token, {**OURS, "parts": "2"})
    try:
        with nodes(token, 1) as (decoder,):
            expected = decoder.transport.receiver.expect("t", missing(1), deadline_s=soon_s(60))
            push = prefiller.transport.pusher.start(
                "t", decoder.transport.address, deadline_s=soon_s(60)
            )
            assert expected is not None and push is not None
            until(lambda: push.over and expected.done, prefiller, decoder)
            assert expected.reason == "refused"
            assert "parts '2' there, '1' here" in caplog.text
            assert "chunk_size" not in caplog.text
            assert prefiller.count("push.ended.refused") == 1
            decoder.transport.receiver.release(expected)
    finally:
        prefiller.engine.close()


def test_the_decoder_goes_on_at_its_deadline(token: Path) -> None:
    with nodes(token) as (prefiller, decoder):
        started_s = time.monotonic()
        expected = decoder.transport.receiver.expect("t", missing(2), deadline_s=soon_s(0.3))
        push = prefiller.transport.pusher.start(
            "t", decoder.transport.address, deadline_s=soon_s(60)
        )
        assert expected is not None and push is not None
        prefiller.store(0)
        until(lambda: expected.done, prefiller, decoder)
        assert 0.3 <= time.monotonic() - started_s < 0.6
        assert expected.reason == "deadline" and decoder.holds(0)
        until(lambda: push.over, prefiller, decoder)
        assert prefiller.count("push.ended.stopped") == 1
        decoder.transport.receiver.release(expected)


def test_a_prefiller_that_never_speaks_is_not_waited_for_long(token: Path) -> None:
    with nodes(token, 1, transfer_start_s=0.2) as (decoder,):
        started_s = time.monotonic()
        expected = decoder.transport.receiver.expect("t", missing(2), deadline_s=soon_s(60))
        assert expected is not None
        until(lambda: expected.done, decoder)
        assert 0.2 <= time.monotonic() - started_s < 0.5
        assert expected.reason == "no_prefiller"
        decoder.transport.receiver.release(expected)


def test_an_aborted_request_stops_the_push(token: Path) -> None:
    with nodes(token) as (prefiller, decoder):
        expected, push = begun(prefiller, decoder, 8, 60)
        prefiller.store(0)
        until(lambda: decoder.holds(0), prefiller, decoder)
        decoder.transport.receiver.release(expected)
        decoder.transport.receiver.release(expected)
        until(lambda: push.over, prefiller, decoder)


@pytest.mark.parametrize("orderly", [True, False])
def test_a_prefiller_that_goes_frees_its_slots(token: Path, orderly: bool) -> None:
    prefiller = Node(token)
    with nodes(token, 1) as (decoder,):
        expected, _ = begun(prefiller, decoder, 3, 60)
        prefiller.store(0)
        until(lambda: decoder.holds(0), prefiller, decoder)
        if orderly:
            prefiller.engine.close()
        else:
            prefiller.transport.hub.channel.close()
        until(lambda: expected.done, decoder)
        assert expected.reason == ("not_computed" if orderly else "lost")
        decoder.transport.receiver.release(expected)
    prefiller.engine.close()


def test_a_decoder_that_is_away_costs_the_prefiller_nothing(token: Path) -> None:
    with nodes(token, 1) as (prefiller,):
        gone = "tcp://127.0.0.1:9"
        push = prefiller.transport.pusher.start("t", gone, deadline_s=soon_s(60))
        assert push is not None
        prefiller.store(0)
        until(lambda: push.over, prefiller)
        assert prefiller.count("push.ended.not_reached") == 1
        assert prefiller.holds(0)


def test_a_lost_decoder_frees_what_was_pinned(token: Path) -> None:
    decoder = Node(token)
    with nodes(token, 1) as (prefiller,):
        _, push = begun(prefiller, decoder, 3, 60)
        prefiller.store(0)
        until(lambda: decoder.holds(0), prefiller, decoder)
        decoder.engine.close()
        prefiller.store(1)
        until(lambda: push.over, prefiller)


@pytest.mark.parametrize("damage", ["payload", "header", "other key"])
def test_damaged_chunks_are_never_served(token: Path, damage: str) -> None:
    with nodes(token) as (prefiller, decoder):
        expected = decoder.transport.receiver.expect("t", missing(1), deadline_s=soon_s())
        assert expected is not None
        prefiller.store(0)
        prefiller.store(7)
        host = prefiller.engine.host
        chunk = host.get(key(0))
        other = host.get(key(7))
        assert chunk is not None and other is not None
        from lmcache_core.tiers.framing import frame

        frame(chunk, host.slot(chunk))
        frame(other, host.slot(other))
        if damage == "payload":
            host.payload(chunk)[5000] ^= 1
        elif damage == "header":
            host.slot(chunk)[20] ^= 1
        else:
            host.slot(chunk)[:] = host.slot(other)
        push = prefiller.transport.pusher.start("t", decoder.transport.address, deadline_s=soon_s())
        assert push is not None
        until(lambda: expected.done, prefiller, decoder)
        assert decoder.engine.host.get(key(0)) is None
        rejected = [n for n in decoder.engine.metrics.snapshot() if "receive.rejected" in n]
        assert len(rejected) == 1
        prefiller.transport.pusher.computed(push)
        decoder.transport.receiver.release(expected)


def test_no_room_expects_what_fits(token: Path) -> None:
    with nodes(token, max_expected_bytes=2 * SLOT_BYTES) as (prefiller, decoder):
        expected, push = begun(prefiller, decoder, 5)
        for number in range(5):
            prefiller.store(number)
        until(lambda: expected.done, prefiller, decoder)
        assert [decoder.holds(n) for n in range(5)] == [True, True, False, False, False]
        prefiller.transport.pusher.computed(push)
        decoder.transport.receiver.release(expected)


def test_a_verified_chunk_can_not_be_written_again(token: Path) -> None:
    """A prefiller that writes on with a ticket it was given."""
    with nodes(token) as (prefiller, decoder):
        offers: list[messages.Offer] = []
        hub = prefiller.transport.hub
        seen = hub._handlers[messages.Offer]

        def watch(peer: str, message: messages.Offer) -> None:
            offers.append(message)
            seen(peer, message)

        hub.on(messages.Offer, watch)
        expected, push = begun(prefiller, decoder, 1)
        prefiller.store(0)
        until(lambda: expected.done, prefiller, decoder)
        chunk = prefiller.engine.host.get(key(0))
        assert chunk is not None
        prefiller.engine.host.payload(chunk)[:] = 99
        view = prefiller.engine.host.slot(chunk)
        piece = Piece(prefiller.engine.host.buffer(chunk, view), 0)
        number = hub.channel.write(
            push.peer, offers[0].tickets[0], [piece], OpContext(deadline_s=soon_s(1))
        )
        assert hub.channel.wait(number, 2) == [Status.REJECTED]
        assert decoder.holds(0)
        prefiller.transport.pusher.computed(push)
        decoder.transport.receiver.release(expected)


def test_strange_messages_are_counted_and_change_nothing(token: Path) -> None:
    with nodes(token) as (one, other):
        peer = one.transport.hub.reach(other.transport.address, soon_s())
        one.transport.hub.channel.notify(peer, b"\xff\x00 no message")
        for message in (
            messages.Pushed(transfer="none", key=key(1)),
            messages.End(transfer="none", pushed=3),
            messages.Offer(transfer="none", keys=[key(1)], tickets=[b"x"], last=True),
            messages.Stop(transfer="none"),
            messages.Refuse(transfer="none", reason="why not"),
            messages.Return(ask=7),
            messages.Have(ask=7, present=[True]),
        ):
            assert one.transport.hub.send(peer, message)
        until(lambda: other.count("push.unexpected"), one, other)
        assert other.count("channel.not_understood") == 1


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    chunks=st.integers(1, 6),
    computed=st.integers(0, 6),
    events=st.lists(st.sampled_from(["poll p", "poll d", "abort", "sleep"]), max_size=12),
)
def test_whatever_happens_nothing_leaks_and_nothing_is_wrong(
    token: Path, chunks: int, computed: int, events: list[str]
) -> None:
    with nodes(token) as (prefiller, decoder):
        expected = decoder.transport.receiver.expect("t", missing(chunks), deadline_s=soon_s())
        push = prefiller.transport.pusher.start("t", decoder.transport.address, deadline_s=soon_s())
        assert expected is not None and push is not None
        stored = 0
        for event in events:
            if event == "abort":
                decoder.transport.receiver.release(expected)
            elif event == "sleep":
                time.sleep(0.003)
            else:
                (prefiller if event == "poll p" else decoder).engine.poll()
            if stored < computed:
                prefiller.store(stored)
                stored += 1
        for number in range(stored, computed):
            prefiller.store(number)
        prefiller.transport.pusher.computed(push)
        until(lambda: expected.done, prefiller, decoder)
        held = [decoder.holds(number) for number in range(chunks)]
        if "abort" not in events:
            assert held == [number < computed for number in range(chunks)]
        decoder.transport.receiver.release(expected)


def test_configurations_that_can_not_be(token: Path, tmp_path: Path) -> None:
    def refused(**config: object) -> str:
        with pytest.raises((ConfigError, BackendUnavailable)) as caught:
            open_chunks(EngineConfig(host_bytes=1 << 20, prefault=False, **config))  # type: ignore[arg-type]
        return str(caught.value)

    readable = tmp_path / "readable"
    readable.write_text("0123456789abcdef" * 2)
    os.chmod(readable, 0o644)
    assert "channel_token_file" in refused(channel="tcp://127.0.0.1:0")
    assert "peers without a channel" in refused(peers=("tcp://127.0.0.1:1",))
    good = {"channel_token_file": str(token)}
    assert "did you mean tcp" in refused(channel="tpc://127.0.0.1:0", **good)
    assert "max_peer" in refused(channel="tcp://127.0.0.1:0?max_peer=3", **good)
    assert "chmod 600" in refused(channel="tcp://127.0.0.1:0", channel_token_file=str(readable))
    assert "lmc token" in refused(channel="tcp://127.0.0.1:0", channel_token_file="/none/there")
    with nodes(token, 1) as (node,):
        taken = node.transport.address
        assert "another port" in refused(channel=taken, **good)


def test_an_unusable_grant_is_a_lost_peer(token: Path) -> None:
    with nodes(token) as (one, other):
        chunk = one.engine.reserve_key(key(0), None, layout=LAYOUT)
        assert chunk is not None
        buffer = one.engine.host.buffer(chunk, one.engine.host.slot(chunk))
        with pytest.raises(BackendUnavailable):
            one.transport.hub.channel.grant("nobody", [buffer], access=Access.WRITE, lease_s=1)
        one.engine.abort([chunk])
        assert other.transport.address


def test_a_release_may_come_before_the_answer_that_it_is_about(token: Path) -> None:
    """Native code can end between a call's answer and our looking at it."""
    with nodes(token, 1) as (node,):
        engine = node.engine
        node.store(0)
        chunk = engine.host.get(key(0))
        assert chunk is not None
        for _ in range(2):
            engine.host.pin(chunk)
        engine.released(chunk.offset)
        engine.poll()
        engine.hold(chunk)
        assert chunk.pins == 1
        engine.hold(chunk)
        assert chunk.pins == 1, "each of two holders is released by its own"
        engine.released(chunk.offset)
        engine.poll()
        assert chunk.pins == 0
        lost = engine.reserve_key(key(1), None, layout=LAYOUT)
        assert lost is not None
        engine.released(lost.offset)
        engine.poll()
        engine.lose(lost)
        assert engine.host.lost_bytes == 0


def test_what_is_joined_after_the_request_left_is_not_kept(token: Path) -> None:
    with nodes(token, 1) as (decoder,):
        receiver = decoder.transport.receiver
        first = receiver.expect("a", missing(1), deadline_s=soon_s())
        second = receiver.expect("b", missing(2), deadline_s=soon_s())
        assert first is not None and second is not None
        receiver.release(second)
        receiver.release(first)
