"""A tier below host that is slow, as the clients of a node server see it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from node_support import SLOT_BYTES, Client, client, keys_of, running, until

from lmcache_core.cli.serve import node_status
from lmcache_core.node.server import NodeServer

KEYS = keys_of("a", 5)


class Slow:
    """A server over a disk whose answers take ``seconds``, and a client of it."""

    def __init__(self, server: NodeServer, path: str, one: Client) -> None:
        self.path = path
        self.one = one
        self.seconds = 0.0
        connector: Any = server.engine.tiers.readable[0].connector
        exists = connector.exists

        def slowly(*args: Any) -> Any:
            time.sleep(self.seconds)
            return exists(*args)

        connector.exists = slowly
        one.store(KEYS)
        until(lambda: server.engine.metrics.snapshot().get("disk.stored") == 5)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Slow]:
    tiers = [{"host": 64 * SLOT_BYTES}, {"url": f"file://{tmp_path}/kv", "deadline_s": 10}]
    with running(tmp_path, tiers=tiers) as (server, path), client(path) as one:
        yield Slow(server, path, one)


def test_it_does_not_make_the_server_look_dead(slow: Slow) -> None:
    cache = slow.one.cache
    cache.forget(KEYS)
    slow.seconds = 2 * cache.config.node_reply_timeout_s
    ticket = cache.prefetch(KEYS, deadline_s=cache.now_s() + 10)
    assert slow.one.store(keys_of("b", 3)) == 3, "nobody else waits for it"
    assert not ticket.done
    assert ticket.hits() == [] and cache.why_missed(ticket, 0) == "deadline"
    until(lambda: cache.poll() or ticket.done)
    assert len(ticket.hits()) == 5
    assert cache.connected


def test_what_is_resident_is_offered_when_the_deadline_comes(slow: Slow) -> None:
    cache = slow.one.cache
    cache.forget(KEYS[2:])
    slow.seconds = 0.9
    start_s = cache.now_s()
    ticket = cache.prefetch(KEYS, deadline_s=start_s + 0.4)
    until(lambda: cache.poll() or ticket.done)
    assert cache.now_s() - start_s <= 0.4
    assert len(ticket.hits()) == 2
    assert cache.why_missed(ticket, 2) == "deadline"
    assert cache.connected
    cache.release(ticket)
    cache.poll()
    until(lambda: node_status(slow.path, "")["sessions"][0]["held_bytes"] == 0)


def test_a_ticket_that_is_released_early_holds_nothing(slow: Slow) -> None:
    cache = slow.one.cache
    cache.forget(KEYS[2:])
    slow.seconds = 0.3
    for _ in range(3):
        ticket = cache.prefetch(KEYS, deadline_s=cache.now_s() + 0.05)
        cache.release(ticket)
        assert ticket.done and ticket.hits() == []
    cache.poll()
    until(lambda: cache.poll() or node_status(slow.path, "")["sessions"][0]["tickets"] == 0)
    time.sleep(0.5)
    cache.poll()
    assert cache.connected
    assert node_status(slow.path, "")["sessions"][0]["held_bytes"] == 0


def test_a_deadline_that_has_passed_is_no_fault_of_the_server(slow: Slow) -> None:
    cache = slow.one.cache
    ticket = cache.prefetch(KEYS, deadline_s=cache.now_s() - 1)
    assert ticket.done and ticket.hits() == []
    cache.release(ticket)
    assert slow.one.load(KEYS) == 5
    assert cache.connected
