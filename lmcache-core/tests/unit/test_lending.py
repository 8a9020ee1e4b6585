"""Chunks that an engine's peers read out of its host tier, and the tier that a peer is."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from transport_rig import LAYOUT, Node, key, nodes, soon_s, until

from lmcache_core.prefetch import Prefetch
from lmcache_core.sdk import OpContext, Status, Unsupported
from lmcache_core.transport import messages
from lmcache_core.transport.peers import PeerConnector


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("token") / "token"
    file.touch(0o600)
    file.write_text(secrets.token_hex(32))
    return file


def fetched(node: Node, numbers: Sequence[int], *others: Node) -> int:
    """How many chunks of the prefix come to ``node``, with their own bytes."""
    keys = [key(n) for n in numbers]
    ticket: Prefetch = node.engine.prefetch_keys(keys, layout=LAYOUT)
    until(lambda: ticket.done, node, *others)
    count = len(ticket.hits())
    assert all(node.holds(n) for n in numbers[:count])
    node.engine.release(ticket)
    return count


def test_a_peer_that_stands_idle_lends(token: Path) -> None:
    with nodes(token, 1) as (lender,):
        for number in range(5):
            lender.store(number)
        with nodes(token, 1, peers=(lender.transport.address,)) as (borrower,):
            assert fetched(borrower, range(8)) == 5  # the lender is not polled meanwhile
            assert borrower.count("peer1.read_bytes") > 0
        until(lambda: lender.transport.lender.lent_bytes == 0, lender)


def test_lent_chunks_are_not_evicted_and_come_back(token: Path) -> None:
    with nodes(token, 2, lend_lease_s=0.4) as (lender, other):
        lender.store(0)
        hub = other.transport.hub
        peer = hub.reach(lender.transport.address, soon_s())
        lent = hub.call(peer, lambda ask: messages.Borrow(ask=ask, keys=[key(0), key(1)]), soon_s())
        assert isinstance(lent, messages.Lent) and lent.lent == [0]
        for number in range(100, 250):
            chunk = lender.engine.reserve_key(key(number), None, layout=LAYOUT)
            if chunk is not None:
                lender.engine.commit([chunk])
        assert lender.holds(0)
        until(lambda: lender.transport.lender.lent_bytes == 0, lender)
        assert lender.count("lend.lease_ended") == 1


def test_no_more_is_lent_than_allowed(token: Path) -> None:
    with nodes(token, 1, max_lent_bytes=250_000) as (lender,):
        for number in range(5):
            lender.store(number)
        with nodes(token, 1, peers=(lender.transport.address,)) as (borrower,):
            assert fetched(borrower, range(5), lender) <= 5
            assert lender.count("lend.refused") >= 1
        until(lambda: lender.transport.lender.lent_bytes == 0, lender)


def test_a_borrower_that_dies_gives_back(token: Path) -> None:
    with nodes(token, 1) as (lender,):
        lender.store(0)
        other = Node(token)
        hub = other.transport.hub
        peer = hub.reach(lender.transport.address, soon_s())
        hub.call(peer, lambda ask: messages.Borrow(ask=ask, keys=[key(0)]), soon_s())
        assert lender.transport.lender.lent_bytes > 0
        other.engine.close()
        until(lambda: lender.transport.lender.lent_bytes == 0, lender)


def test_a_dead_peer_costs_one_deadline(token: Path) -> None:
    with nodes(token, 1, peers=("tcp://127.0.0.1:9",), peer_deadline_s=0.2) as (node,):
        started_s = time.monotonic()
        assert fetched(node, range(3)) == 0
        assert time.monotonic() - started_s < 0.5
        started_s = time.monotonic()
        assert fetched(node, range(10, 13)) == 0
        assert time.monotonic() - started_s < 0.1, "its breaker is open"


def test_a_silent_peer_costs_one_deadline(token: Path) -> None:
    with nodes(token, 1) as (silent,):
        silent.transport.hub.on(messages.Ask, lambda peer, message: None)
        address = silent.transport.address
        with nodes(token, 1, peers=(address,), peer_deadline_s=0.2) as (node,):
            started_s = time.monotonic()
            assert fetched(node, range(3)) == 0
            assert 0.15 < time.monotonic() - started_s < 0.6
            assert fetched(node, range(10, 13)) == 0
            assert time.monotonic() - started_s < 0.7


def test_a_peer_that_answers_nonsense_gives_nothing(token: Path) -> None:
    with nodes(token, 2) as (liar, node):
        liar.store(0)
        send = liar.transport.hub.send
        connector = PeerConnector(node.transport.hub, liar.transport.address)
        chunk = node.engine.host.borrow(key(0), None, LAYOUT)
        assert chunk is not None
        host = node.engine.host
        targets = [host.buffer(chunk, host.slot(chunk))]

        def ctx() -> OpContext:
            return OpContext(deadline_s=soon_s(0.5))

        liar.transport.hub.on(
            messages.Ask, lambda peer, m: send(peer, messages.Have(ask=m.ask, present=[]))
        )
        assert connector.exists([key(0)], ctx()) == [Status.FAILED]
        for numbers, sizes in (([5], [10]), ([0], [0]), ([-1], [4096])):
            liar.transport.hub.on(
                messages.Borrow,
                lambda peer, m, n=numbers, s=sizes: send(
                    peer, messages.Lent(ask=m.ask, ticket=b"no ticket", lent=n, nbytes=s)
                ),
            )
            results = connector.get_into([key(0)], targets, ctx())
            assert results[0].status is Status.FAILED
        liar.transport.hub.on(
            messages.Borrow,
            lambda peer, m: send(
                peer, messages.Lent(ask=m.ask, ticket=b"no ticket", lent=[0], nbytes=[4096])
            ),
        )
        assert connector.get_into([key(0)], targets, ctx())[0].status is Status.MISS
        with pytest.raises(Unsupported):
            connector.put_from([key(0)], targets, ctx())
        host.abort(chunk)


def test_peers_of_two_engines_find_each_other(token: Path) -> None:
    with nodes(token, 1) as (one,), nodes(token, 1, peers=(one.transport.address,)) as (two,):
        one.store(0)
        assert fetched(two, [0], one) == 1
        two.drop_all()
        one.drop_all()
        assert fetched(two, [0], one) == 0
