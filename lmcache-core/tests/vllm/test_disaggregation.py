"""Prefill in one vLLM engine, decode in another: the text of an engine alone, whatever happens to
the other side, and nothing that stays behind."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from conftest import random_tokens, save_llama
from pd_engines import (
    CHUNK,
    TAKES_LONG_S,
    Pd,
    cached,
    decode,
    moved,
    prefill,
    recomputed,
    transfer,
    until,
    waited_s,
)

DEADLINE_S = 1.5
SLACK_S = 3.0
SLOW_STEP_S = 0.3
LENGTHS = [100, 200, CHUNK, 300, 4 * CHUNK, 1100]
"""Shorter than a block, than a chunk, a chunk, not of whole blocks, several chunks, and some."""


@pytest.fixture(scope="module")
def pd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pd]:
    """Every test leaves both engines alive and holding nothing."""
    path = tmp_path_factory.mktemp("pd")
    made = Pd(path, save_llama(path / "llama"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_stays_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "pd" in request.fixturenames and request.node.function is not test_they_end_in_a_transfer:
        request.getfixturevalue("pd").assert_quiet()


@pytest.fixture(scope="module")
def over_ucx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pd]:
    from lmcache_core.channels.registry import Channels

    if "nixl+ucx" not in Channels().schemes():
        pytest.skip("no channel nixl+ucx: lmcache-backend-nixl is not installed here")
    path = tmp_path_factory.mktemp("ucx")
    made = Pd(path, save_llama(path / "llama"), channel="nixl+ucx")
    yield made
    made.close()


def several_lengths(pd: Pd) -> None:
    for seed, length in enumerate(LENGTHS):
        ids = random_tokens(100 + seed, length)
        prefilled, decoded = pd.run(ids)
        assert decoded["token_ids"] == pd.reference(ids), length
        assert transfer(decoded) == {"received_bytes": moved(ids), "reason": ""}
        assert recomputed(decoded) == 0, length
        assert prefilled["prefilled_tokens"] == length
        assert sum(cached(decoded).values()) >= length - 1
    pd.assert_quiet()


def test_the_decoder_computes_nothing_but_the_last_token(pd: Pd) -> None:
    several_lengths(pd)


def test_the_decoder_computes_nothing_but_the_last_token_over_ucx(over_ucx: Pd) -> None:
    several_lengths(over_ucx)


def test_a_prompt_of_one_token_needs_nothing_from_elsewhere(pd: Pd) -> None:
    """Nothing is left to load where the last token is computed again."""
    ids = random_tokens(110, 1)
    for _ in range(2):
        _, decoded = pd.run(ids)
        assert decoded["token_ids"] == pd.reference(ids)
        assert transfer(decoded) == {"received_bytes": 0, "reason": ""}
        assert waited_s(decoded) < SLACK_S
    _, decoded = pd.run(ids * 2)
    assert decoded["token_ids"] == pd.reference(ids * 2)
    assert transfer(decoded) == {"received_bytes": moved(ids * 2), "reason": ""}


def test_two_prompts_at_once(pd: Pd) -> None:
    prompts = [random_tokens(120 + i, 700) for i in range(2)]
    names = [pd.begin(ids) for ids in prompts]
    for ids, name in zip(prompts, names):
        decoded = pd.decoder.answer(name)
        assert decoded["token_ids"] == pd.reference(ids)
        assert transfer(decoded) == {"received_bytes": moved(ids), "reason": ""}
        assert recomputed(decoded) == 0
        pd.prefiller.answer(name)


def test_what_the_decoder_has_is_not_sent_again(pd: Pd) -> None:
    ids = random_tokens(130, 3 * CHUNK)
    pd.run(ids)
    pushed = pd.prefiller.counted("push.bytes")
    _, again = pd.run(ids)
    assert again["token_ids"] == pd.reference(ids)
    assert transfer(again) == {"received_bytes": 0, "reason": ""}
    assert recomputed(again) == 0
    longer = ids + random_tokens(131, CHUNK)
    _, decoded = pd.run(longer)
    assert decoded["token_ids"] == pd.reference(longer)
    assert transfer(decoded) == {"received_bytes": moved(longer) - moved(ids), "reason": ""}
    pd.assert_quiet()
    assert pd.prefiller.counted("push.bytes") == pushed + moved(longer) - moved(ids)


def test_a_prefiller_that_never_comes_costs_the_deadline(pd: Pd) -> None:
    ids = random_tokens(140, 600)
    with pd.decoder.waiting_at_most(DEADLINE_S):
        decoded = pd.decoder.run(ids, decode("nobody-comes"))
    assert decoded["token_ids"] == pd.reference(ids)
    assert DEADLINE_S <= waited_s(decoded) < DEADLINE_S + SLACK_S
    assert transfer(decoded) == {"received_bytes": 0, "reason": "deadline"}


def test_a_prefiller_that_comes_too_late_is_told_so(pd: Pd) -> None:
    """Also by a decoder that stands idle since, and is not stepped."""
    ids = random_tokens(145, 600)
    with pd.decoder.waiting_at_most(0.05):
        assert pd.decoder.run(ids, decode("too-late"))["token_ids"] == pd.reference(ids)
    pd.decoder.assert_quiet()
    pd.decoder.tell(pause=True)
    told = pd.prefiller.run(ids, prefill("too-late", pd.decoder.address))
    assert told["token_ids"] == pd.reference(ids)
    pd.prefiller.assert_quiet()


def test_a_decoder_that_is_not_there_costs_the_prefiller_nothing(pd: Pd) -> None:
    ids = random_tokens(150, 600)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        told = pd.prefiller.run(ids, prefill("silent", f"tcp://127.0.0.1:{port}"))
    assert told["token_ids"] == pd.reference(ids)
    assert waited_s(told) < SLACK_S
    told = pd.prefiller.run(ids[::-1], prefill("gone", f"tcp://127.0.0.1:{port}"))
    assert told["token_ids"] == pd.reference(ids[::-1])
    assert waited_s(told) < SLACK_S
    assert transfer(told) == {"acknowledged_bytes": 0}


def test_abort_at_the_decoder_stops_the_push(pd: Pd) -> None:
    ids = random_tokens(160, 3000)
    with pd.prefiller.slowed(SLOW_STEP_S):
        stopped = pd.prefiller.counted("push.ended.stopped")
        name = pd.begin_slowly(ids)
        pd.decoder.ask(name, abort=name)
        pd.decoder.assert_quiet()
        until(lambda: pd.prefiller.counted("push.ended.stopped") == stopped + 1)
    assert pd.prefiller.answer(name)["token_ids"] == pd.reference(ids)[:1]
    pd.assert_works(161)


def test_abort_at_the_prefiller_leaves_the_rest_to_the_decoder(pd: Pd) -> None:
    ids = random_tokens(170, 3000)
    with pd.prefiller.slowed(SLOW_STEP_S):
        name = pd.begin_slowly(ids)
        pd.prefiller.ask(name, abort=name)
        pd.prefiller.assert_quiet()
    decoded = pd.decoder.answer(name)
    assert decoded["token_ids"] == pd.reference(ids)
    assert waited_s(decoded) < TAKES_LONG_S / 2, "told, not waited out"
    told = transfer(decoded)
    assert told is not None and told["reason"] == "not_computed"
    assert 0 < told["received_bytes"] < moved(ids)
    assert 0 < recomputed(decoded) < len(ids) - CHUNK, "what had come was used"
    pd.assert_works(171)


def test_a_deadline_in_the_middle_of_pushes(pd: Pd) -> None:
    with pd.decoder.waiting_at_most(0.05):
        for seed in range(20):
            ids = random_tokens(180 + seed, 900)
            name = pd.begin(ids)
            assert pd.decoder.answer(name)["token_ids"] == pd.reference(ids)
            pd.prefiller.answer(name)
    assert pd.decoder.counted("receive.ended.deadline") > 0
    pd.assert_works(200)


@pytest.mark.parametrize(
    "params",
    [
        {"lmcache": "prefill"},
        {"lmcache": ["decode", "x"]},
        {"lmcache": {"role": "both", "transfer_id": "x"}},
        {"lmcache": {"role": "decode"}},
        {"lmcache": {"role": "decode", "transfer_id": 7}},
        {"lmcache": {"role": "decode", "transfer_id": "x" * 129}},
        {"lmcache": {"role": "prefill", "transfer_id": "x"}},
        {"lmcache": {"role": "prefill", "transfer_id": "x", "decoder": 7}},
        {"lmcache": {"role": "prefill", "transfer_id": "x", "decoder": "127.0.0.1:1"}},
        {"lmcache": {}},
    ],
)
def test_what_is_no_wish_is_served_without_transfer(pd: Pd, params: Any) -> None:
    ids = random_tokens(210, 150)
    for engine in (pd.prefiller, pd.decoder):
        before = engine.counted("transfer.not_possible")
        told = engine.run(ids, params)
        assert told["token_ids"] == pd.reference(ids)
        assert transfer(told) is None
        assert engine.counted("transfer.not_possible") == before + 1


def test_each_role_refuses_the_work_of_the_other(pd: Pd) -> None:
    ids = random_tokens(220, 500)
    for engine, params in (
        (pd.prefiller, decode("wrong-side")),
        (pd.decoder, prefill("wrong-side", pd.decoder.address)),
    ):
        before = engine.counted("transfer.not_possible")
        told = engine.run(ids, params)
        assert told["token_ids"] == pd.reference(ids)
        assert waited_s(told) < SLACK_S
        assert transfer(told) is None
        assert engine.counted("transfer.not_possible") == before + 1


def test_params_of_other_connectors_are_not_ours(pd: Pd) -> None:
    ids = random_tokens(230, 300)
    before = pd.decoder.counted("transfer.not_possible")
    told = pd.decoder.run(ids, {"do_remote_decode": False, "remote_host": "x"})
    assert told["token_ids"] == pd.reference(ids)
    assert pd.decoder.counted("transfer.not_possible") == before


def test_another_layout_is_refused_and_the_field_is_named(pd: Pd) -> None:
    ids = random_tokens(240, 600)
    other = pd.start("kv_producer", chunk_size=CHUNK // 2)
    assert other.address
    other.remember()
    name = "another-layout"
    pd.decoder.start(name, ids, decode(name))
    other.start(name, ids, prefill(name, pd.decoder.address), 1)
    decoded = pd.decoder.answer(name)
    assert decoded["token_ids"] == pd.reference(ids)
    assert waited_s(decoded) < SLACK_S, "refused, not waited out"
    assert transfer(decoded) == {"received_bytes": 0, "reason": "refused"}
    other.answer(name)
    other.assert_quiet()
    other.kill()
    (line,) = [at for at in pd.decoder.log.read_text().splitlines() if "prefiller_refused" in at]
    assert "chunk_size '128' there, '256' here" in line
    assert "hash_algorithm" not in line, "only what differs"
    pd.assert_works(241)


def test_a_prefiller_that_is_frozen(pd: Pd) -> None:
    ids = random_tokens(250, 3000)
    with pd.decoder.waiting_at_most(2 * DEADLINE_S), pd.prefiller.slowed(SLOW_STEP_S):
        name = pd.begin_slowly(ids)
        with pd.prefiller.frozen():
            decoded = pd.decoder.answer(name)
            pd.decoder.assert_quiet()
    assert decoded["token_ids"] == pd.reference(ids)
    assert waited_s(decoded) < 2 * DEADLINE_S + SLACK_S
    told = transfer(decoded)
    assert told is not None and told["received_bytes"] < moved(ids)
    assert told["reason"] in ("deadline", "lost")
    pd.prefiller.answer(name)
    pd.assert_quiet()
    _, again = pd.run(ids)
    assert again["token_ids"] == pd.reference(ids), "nothing that came late was used"
    pd.assert_works(251)


def test_a_decoder_that_is_frozen(pd: Pd) -> None:
    ids, other = random_tokens(260, 3000), random_tokens(261, 600)
    with pd.prefiller.slowed(SLOW_STEP_S):
        name = pd.begin_slowly(ids)
        with pd.decoder.frozen():
            assert pd.prefiller.answer(name)["token_ids"] == pd.reference(ids)[:1]
            assert pd.prefiller.run(other)["token_ids"] == pd.reference(other)
    assert pd.decoder.answer(name)["token_ids"] == pd.reference(ids)
    pd.assert_works(262)


def test_a_prefiller_that_is_killed(pd: Pd) -> None:
    ids = random_tokens(270, 3000)
    pd.prefiller.tell(slow=SLOW_STEP_S)
    name = pd.begin_slowly(ids)
    pd.prefiller.kill()
    decoded = pd.decoder.answer(name)
    assert decoded["token_ids"] == pd.reference(ids)
    assert waited_s(decoded) < TAKES_LONG_S / 2, "seen, not waited out"
    told = transfer(decoded)
    assert told is not None and told["reason"] == "lost"
    pd.decoder.assert_quiet()
    pd.replace_prefiller()
    pd.assert_works(271)


def test_a_decoder_that_is_killed(pd: Pd) -> None:
    ids, other = random_tokens(280, 3000), random_tokens(281, 600)
    with pd.prefiller.slowed(SLOW_STEP_S):
        name = pd.begin_slowly(ids)
        pd.decoder.kill()
        assert pd.prefiller.answer(name)["token_ids"] == pd.reference(ids)[:1]
    assert pd.prefiller.run(other)["token_ids"] == pd.reference(other)
    pd.prefiller.assert_quiet()
    pd.replace_decoder()
    pd.assert_works(282)


def test_they_end_in_a_transfer(pd: Pd) -> None:
    """The last test with these engines."""
    pd.prefiller.tell(slow=SLOW_STEP_S)
    pd.begin_slowly(random_tokens(285, 3000))
    for engine in (pd.decoder, pd.prefiller):
        engine.end()
    assert (pd.decoder.ended(), pd.prefiller.ended()) == (0, 0)
    for engine in (pd.decoder, pd.prefiller):
        assert "Traceback" not in engine.log.read_text()


@pytest.mark.parametrize(
    ("model", "chunk", "exact"),
    [
        pytest.param(tiny_models.gemma3, 256, False, id="windows-and-full"),
        pytest.param(tiny_models.mistral, 256, True, id="windows-above-a-chunk"),
        pytest.param(tiny_models.mistral, 512, False, id="windows-below-a-chunk"),
    ],
)
def test_sliding_windows(tmp_path: Path, model: Any, chunk: int, exact: bool) -> None:
    """Where a chunk keeps only the pages that a hit at its end needs, whole chunks are moved and
    the decoder computes the rest."""
    pd = Pd(tmp_path, model(tmp_path / "model"), extra={"chunk_size": chunk})
    try:
        for seed, length in enumerate([100, 300, 2 * chunk, 1100]):
            ids = random_tokens(290 + seed, length)
            _, decoded = pd.run(ids)
            assert decoded["token_ids"] == pd.reference(ids), length
            told = transfer(decoded)
            assert told is not None and not told["reason"]
            here = length - 1 if exact else (length - 1) // chunk * chunk
            assert recomputed(decoded) == length - 1 - here, length
            assert bool(told["received_bytes"]) == bool(here), length
        pd.assert_quiet()
    finally:
        pd.close()


def test_with_prefix_caches_of_the_engines_own(tmp_path: Path) -> None:
    pd = Pd(tmp_path, save_llama(tmp_path / "llama"), options={"enable_prefix_caching": True})
    try:
        start = random_tokens(295, 2 * CHUNK + 128)
        prompts = [
            start,
            start,
            start[:CHUNK],
            start + random_tokens(296, 300),
            start[:300] + random_tokens(297, 3 * CHUNK),
        ]
        for number, ids in enumerate(prompts):
            _, decoded = pd.run(ids)
            assert decoded["token_ids"] == pd.reference(ids), number
            assert recomputed(decoded) <= 128, "at most the block of the last token"
            told = transfer(decoded)
            assert told is not None and not told["reason"]
        for side in (pd.prefiller, pd.decoder):
            side.tell(forget=True)
        for number, ids in enumerate(prompts):
            _, decoded = pd.run(ids)
            assert decoded["token_ids"] == pd.reference(ids), number
        pd.assert_quiet()
    finally:
        pd.close()
