"""Two vLLM engines that lend each other their host tiers: what one has served the other need not
compute, and a lender that is away, frozen or forgetful costs at most its deadline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import random_tokens, save_llama
from pd_engines import CHUNK, Engines, cached, until, waited_s

PEER_DEADLINE_S = 1.0
SLACK_S = 1.0


class Peers(Engines):
    """A lender, a borrower that asks it, and an engine without a connector."""

    def __init__(self, logs: Path, model: Path) -> None:
        super().__init__(logs, model, extra={"peer_deadline_s": PEER_DEADLINE_S})
        try:
            self.lender = self.start("kv_both")
            self.start_alone()
            self.borrower = self.start("kv_both", peers=[self.lender.address])
            assert self.borrower.address
            self.lender.remember()
            self.borrower.remember()
        except BaseException:
            self.close()
            raise

    def lend(self, ids: list[int]) -> None:
        """Have the lender serve a prompt, whose chunks are then in its host tier."""
        assert self.lender.run(ids)["token_ids"] == self.reference(ids)
        self.lender.assert_quiet()

    def assert_borrowed(self, ids: list[int]) -> None:
        told = self.borrower.run(ids)
        assert told["token_ids"] == self.reference(ids)
        assert cached(told) == {"peer1": (len(ids) - 1) // CHUNK * CHUNK}

    def assert_computed(self, ids: list[int], *, within_s: float) -> None:
        told = self.borrower.run(ids)
        assert told["token_ids"] == self.reference(ids)
        assert cached(told) == {}
        assert waited_s(told) < within_s


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    path = tmp_path_factory.mktemp("peers")
    made = Peers(path, save_llama(path / "llama"))
    yield made
    made.close()


def test_what_one_has_served_the_other_reads(peers: Peers) -> None:
    for seed, length in enumerate([1000, 2 * CHUNK + 1, 3000]):
        ids = random_tokens(300 + seed, length)
        peers.lend(ids)
        peers.assert_borrowed(ids)
        told = peers.borrower.run(ids)
        assert told["token_ids"] == peers.reference(ids)
        assert list(cached(told)) == ["host"], "it is here now"
    peers.lender.assert_quiet()
    peers.borrower.assert_quiet()


def test_what_neither_has_is_computed_at_once(peers: Peers) -> None:
    peers.assert_computed(random_tokens(310, 1000), within_s=PEER_DEADLINE_S)


def test_only_the_part_that_is_there_is_read(peers: Peers) -> None:
    start = random_tokens(320, 2 * CHUNK)
    peers.lend(start + random_tokens(321, 100))
    ids = start + random_tokens(322, 700)
    told = peers.borrower.run(ids)
    assert told["token_ids"] == peers.reference(ids)
    assert cached(told) == {"peer1": 2 * CHUNK}


def test_a_lender_that_does_not_step_lends(peers: Peers) -> None:
    ids = random_tokens(330, 1000)
    peers.lend(ids)
    peers.lender.tell(pause=True)
    peers.assert_borrowed(ids)
    peers.lender.assert_quiet()


def test_a_lender_that_computes_lends(peers: Peers) -> None:
    ids = random_tokens(340, 1000)
    peers.lend(ids)
    peers.lender.start("long", random_tokens(341, 100), None, 400)
    peers.assert_borrowed(ids)
    assert len(peers.lender.answer("long")["token_ids"]) == 400
    peers.lender.assert_quiet()


def test_both_serve_the_same_prompts_at_once(peers: Peers) -> None:
    prompts = [random_tokens(350 + i, 900) for i in range(6)]
    for number, ids in enumerate(prompts):
        for engine in (peers.lender, peers.borrower):
            engine.start(f"both-{number}", ids, None)
    for number, ids in enumerate(prompts):
        for engine in (peers.lender, peers.borrower):
            assert engine.answer(f"both-{number}")["token_ids"] == peers.reference(ids)
    peers.lender.assert_quiet()
    peers.borrower.assert_quiet()


def test_what_was_dropped_since_it_was_asked_about_is_computed(peers: Peers) -> None:
    ids = random_tokens(360, 1000)
    peers.lend(ids)
    peers.lender.tell(forget_when_asked=True)
    peers.assert_computed(ids, within_s=PEER_DEADLINE_S)
    assert peers.lender.tell(state=True)["slots"] == 0, "it was dropped in between"
    assert peers.borrower.tell(state=True)["gauges"]["peer1.available"] == 1
    peers.lend(ids)
    peers.lend(fresh := random_tokens(361, 600))
    peers.assert_borrowed(fresh)


def test_a_frozen_lender_costs_its_deadline_once(peers: Peers) -> None:
    ids = random_tokens(370, 1000)
    peers.lend(ids)
    with peers.lender.frozen():
        peers.assert_computed(ids, within_s=PEER_DEADLINE_S + SLACK_S)
        for seed in range(371, 375):
            peers.assert_computed(random_tokens(seed, 600), within_s=PEER_DEADLINE_S / 2)
        assert peers.borrower.tell(state=True)["gauges"]["peer1.available"] == 0
    until(lambda: peers.borrower.tell(state=True)["gauges"]["peer1.available"])
    peers.lend(again := random_tokens(375, 700))
    peers.assert_borrowed(again)
    peers.lender.assert_quiet()
    peers.borrower.assert_quiet()


def test_a_dead_lender_costs_its_deadline_once(peers: Peers) -> None:
    """The last test: nobody is there to borrow from afterwards."""
    ids = random_tokens(380, 1000)
    peers.lend(ids)
    peers.lender.kill()
    peers.assert_computed(ids, within_s=PEER_DEADLINE_S + SLACK_S)
    for seed in range(381, 385):
        peers.assert_computed(random_tokens(seed, 600), within_s=PEER_DEADLINE_S / 2)
    assert peers.borrower.tell(state=True)["gauges"]["peer1.available"] == 0
    peers.borrower.assert_quiet()
