"""Several engines, one cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from node_support import (
    LAYOUT,
    LIMIT_S,
    PAYLOAD_BYTES,
    SLOT_BYTES,
    Client,
    assert_nothing_is_held,
    client,
    content,
    keys_of,
    running,
    serving,
    until,
)

from lmcache_core.cache import Cache, Refusal, Wanted
from lmcache_core.cli.serve import node_status
from lmcache_core.envelope import HEADER_BYTES
from lmcache_core.layout import ChunkLayout

HERE = Path(__file__).parent
OTHER = """
import sys
from node_support import client, keys_of
with client(sys.argv[1]) as other:
    print(other.load(keys_of("a", 5)), other.store(keys_of("b", 3)), flush=True)
"""


def run(code: str, *args: str) -> list[str]:
    """A client in another process; the words that it says."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_what_one_process_stores_another_loads(tmp_path: Path) -> None:
    with serving(tmp_path) as server, client(server.socket) as one:
        cache: Cache = one.cache
        assert cache.capacity_bytes == server.status()["host_capacity_bytes"]
        assert one.store(keys_of("a", 5)) == 5
        assert run(OTHER, server.socket) == ["5", "3"]
        assert one.load(keys_of("b", 4)) == 3


def test_a_chunk_is_there_once_it_is_committed_and_not_before(tmp_path: Path) -> None:
    with running(tmp_path) as (_, path), client(path) as one, client(path) as two:
        (slot,) = one.reserve(keys_of("a", 1))
        assert not isinstance(slot, Refusal)
        one.payload(slot)[:] = content(slot.key)
        assert two.load(keys_of("a", 1)) == 0
        assert two.reserve(keys_of("a", 1)) == [Refusal.PRESENT]
        one.cache.commit([slot])
        assert one.cache.settling, "the commit is not sent yet"
        one.cache.poll()
        assert not one.cache.settling
        until(lambda: two.load(keys_of("a", 1)) == 1)


def test_an_aborted_slot_is_free_again(tmp_path: Path) -> None:
    with running(tmp_path) as (server, path), client(path) as one:
        slots = [s for s in one.reserve(keys_of("a", 3)) if not isinstance(s, Refusal)]
        one.cache.abort(slots)
        one.cache.abort(slots)
        assert one.load(keys_of("a", 3)) == 0
        assert server.engine.host.used_bytes == 0


def test_other_namespaces_and_layouts_never_meet(tmp_path: Path) -> None:
    other = ChunkLayout(chunk_size=16, payload_bytes=PAYLOAD_BYTES, description=b"other")
    with running(tmp_path) as (_, path), client(path) as one:
        one.store(keys_of("model a", 4))
        with client(path) as two:
            assert two.load(keys_of("model b", 4)) == 0
        with client(path, layouts=(other,)) as three:
            ticket = three.cache.prefetch(keys_of("model a", 4))
            until(lambda: three.cache.poll() or ticket.done)
            assert ticket.hits() == []
            assert three.cache.why_missed(ticket, 0) == "layout"


def test_one_session_may_have_chunks_of_several_layouts(tmp_path: Path) -> None:
    small = ChunkLayout(chunk_size=16, payload_bytes=500, description=b"small")
    with running(tmp_path) as (_, path), client(path, layouts=(LAYOUT, small)) as one:
        assert one.store(keys_of("a", 3)) == 3
        assert one.store(keys_of("b", 3), layout=1) == 3
        assert one.load(keys_of("b", 3), layout=1) == 3
        assert one.load(keys_of("a", 3)) == 3


def test_a_blank_slot_holds_nothing_of_what_was_there_before(tmp_path: Path) -> None:
    with running(tmp_path) as (_, path), client(path) as one:
        one.store(keys_of("a", 20))
        one.cache.forget(keys_of("a", 20))
        for key in keys_of("b", 20):
            (slot,) = one.cache.reserve([Wanted(key, None, 0, True)])
            assert not isinstance(slot, Refusal)
            assert not one.payload(slot).any()


def test_forget_is_for_everybody_and_reset_for_slots_of_this_engine(tmp_path: Path) -> None:
    with running(tmp_path) as (_, path), client(path) as one, client(path) as two:
        one.store(keys_of("a", 3))
        slots = [s for s in one.reserve(keys_of("b", 2)) if not isinstance(s, Refusal)]
        one.cache.reset()
        one.cache.commit(slots)
        one.cache.poll()
        assert one.load(keys_of("b", 2)) == 0
        assert two.load(keys_of("a", 3)) == 3
        two.cache.forget(keys_of("a", 3)[1:])
        assert two.load(keys_of("a", 3)) == 1
        assert one.load(keys_of("a", 3)) == 1


def test_a_slot_that_was_forgotten_while_it_was_written_is_not_served(tmp_path: Path) -> None:
    with running(tmp_path) as (_, path), client(path) as one, client(path) as two:
        (slot,) = one.reserve(keys_of("a", 1))
        assert not isinstance(slot, Refusal)
        two.cache.forget(keys_of("a", 1))
        assert two.load(keys_of("a", 1)) == 0
        one.cache.commit([slot])
        assert one.load(keys_of("a", 1)) == 0


def test_a_session_over_its_bound_gets_no_room_and_the_others_do(tmp_path: Path) -> None:
    bound = 10 * SLOT_BYTES
    with running(tmp_path, max_session_bytes=bound) as (server, path):
        with client(path) as greedy, client(path) as modest:
            given = greedy.reserve(keys_of("a", 14))
            assert given[10:] == [Refusal.NO_ROOM] * 4
            assert not any(isinstance(slot, Refusal) for slot in given[:10])
            assert modest.store(keys_of("b", 10)) == 10
            slots = [slot for slot in given if not isinstance(slot, Refusal)]
            greedy.cache.abort(slots)
            # Pins count too.
            ticket = greedy.cache.prefetch(keys_of("b", 8))
            until(lambda: greedy.cache.poll() or ticket.done)
            assert len(ticket.hits()) == 8
            second = greedy.cache.prefetch(keys_of("b", 8))
            until(lambda: greedy.cache.poll() or second.done)
            assert len(second.hits()) == 2
            assert greedy.cache.why_missed(second, 2) == "no_room"
            greedy.cache.release(ticket)
            greedy.cache.release(second)
            assert greedy.load(keys_of("b", 8)) == 8
        assert server.engine.metrics.snapshot()["node.over_bound"] == 5
        until(lambda: not node_status(path, "")["sessions"])
        assert server.engine.host.used_bytes == 10 * SLOT_BYTES


def test_chunks_that_are_being_read_are_not_evicted(tmp_path: Path) -> None:
    with running(tmp_path) as (_, path), client(path) as reader, client(path) as writer:
        writer.store(keys_of("a", 4))
        ticket = reader.cache.prefetch(keys_of("a", 4))
        until(lambda: reader.cache.poll() or ticket.done)
        hits = ticket.hits()
        for number in range(12):
            writer.store(keys_of(f"more {number}", 10))
        for slot in hits:
            assert np.array_equal(reader.payload(slot), content(slot.key))
        reader.cache.release(ticket)
        reader.cache.poll()
        for number in range(12):
            writer.store(keys_of(f"again {number}", 10))
        assert reader.load(keys_of("a", 4)) == 0


def test_one_disk_below_serves_all_and_says_so(tmp_path: Path) -> None:
    tiers = [{"host": 64 * SLOT_BYTES}, {"url": f"file://{tmp_path}/kv"}]
    with serving(tmp_path, tiers=tiers) as server, client(server.socket) as one:
        one.store(keys_of("a", 5))
        until(lambda: server.counter("disk.stored") == 5)
        one.cache.forget(keys_of("a", 5))
        ticket = one.cache.prefetch(keys_of("a", 7))
        until(lambda: one.cache.poll() or ticket.done)
        assert len(ticket.hits()) == 5
        assert ticket.sources == dict.fromkeys(keys_of("a", 5), "disk")
        one.cache.release(ticket)
        assert one.cache.reserve([Wanted(keys_of("a", 1)[0], None)]) == [Refusal.PRESENT]
        one.cache.poll()
        until(lambda: not server.status()["sessions"][0]["tickets"])
        assert_nothing_is_held(server.status(), 1)


def test_a_worker_in_another_process_maps_the_same_memory(tmp_path: Path) -> None:
    code = """
import pickle, sys
handle, offset, nbytes = pickle.loads(bytes.fromhex(sys.argv[1]))
attached = handle.attach(warn=print, prefault=False)
print(bytes(attached.arena.view(offset, nbytes)).hex())
attached.release()
"""
    import pickle

    with serving(tmp_path) as server, client(server.socket) as one:
        one.store(keys_of("a", 1))
        ticket = one.cache.prefetch(keys_of("a", 1))
        until(lambda: one.cache.poll() or ticket.done)
        where = ticket.hits()[0].offset + HEADER_BYTES
        order = pickle.dumps((one.cache.handle, where, 64)).hex()
        assert run(code, order) == [content(keys_of("a", 1)[0])[:64].tobytes().hex()]


def test_long_requests_travel_whole(tmp_path: Path) -> None:
    with running(tmp_path) as (_, path), client(path) as one:
        many = keys_of("many", 20_000)
        assert len(one.reserve(many)) == 20_000, "two frames, one round trip"
        ticket = one.cache.prefetch(many)
        until(lambda: one.cache.poll() or ticket.done)
        assert ticket.hits() == []
        assert one.cache.connected


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_asked_for_nothing(tmp_path: Path, count: int) -> None:
    with running(tmp_path) as (_, path):
        one = Client(path)
        ticket = one.cache.prefetch(keys_of("a", count))
        until(lambda: one.cache.poll() or ticket.done)
        assert ticket.hits() == [] and ticket.sources == {}
        assert one.cache.reserve([]) == []
        one.cache.commit([])
        one.cache.release(ticket)
        one.cache.release(ticket)
        one.close()
        one.close()
