"""``lmc pd-proxy`` on real sockets: who gets what, and what is left when one is lost."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from pd_proxy_rig import SSE, FakeEngine, hanging_up, nowhere, rig, until

from lmcache_core.proxy import exchange as exchanges


def pair() -> tuple[FakeEngine, FakeEngine]:
    return FakeEngine("p0"), FakeEngine("d0")


def held(name: str) -> FakeEngine:
    """An engine that reads requests and answers when its ``go`` is set."""
    engine = FakeEngine(name)
    engine.go.clear()
    return engine


def test_both_get_the_request_at_once() -> None:
    prefiller, decoder = held("p0"), held("d0")
    with rig([prefiller], [decoder]) as made, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(made.complete)
        until(lambda: prefiller.seen and decoder.seen, "one waits for the other")
        decoder.go.set()
        assert asking.result().json() == {"from": "d0"}, "the answer waits for no prefiller"
        prefiller.go.set()
        until(made.idle)
        assert made.exchange.counts.prefills == {"done": 1}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_each_side_is_sent(path: str) -> None:
    prefiller, decoder = pair()
    body = {
        "model": "m", "prompt": "hello", "max_tokens": 77, "max_completion_tokens": 78, "n": 1,
        "best_of": 1, "min_tokens": 5, "stream": True, "stream_options": {"include_usage": True},
        "temperature": 0.25, "cache_salt": "tenant",
    }  # fmt: skip
    with rig([prefiller], [decoder]) as made:
        headers = {"authorization": "Bearer sk-1", "cookie": "secret=1"}
        for _ in range(2):
            assert made.client.post(path, json=body, headers=headers).status_code == 200
        until(made.idle)
    first, second = decoder.seen
    assert first.path == prefiller.seen[0].path == path
    assert first.headers["authorization"] == prefiller.seen[0].headers["authorization"]
    assert first.headers["authorization"] == "Bearer sk-1" and "cookie" not in first.headers
    assert {**first.body, "kv_transfer_params": 0} == {**body, "kv_transfer_params": 0}
    assert first.transfer["role"] == "decode" and set(first.transfer) == {"role", "transfer_id"}
    transfer_id = first.transfer["transfer_id"]
    assert re.fullmatch("[0-9a-f]{32}", transfer_id)
    assert second.transfer["transfer_id"] != transfer_id
    same = {name: body[name] for name in ("model", "prompt", "temperature", "cache_salt")}
    assert prefiller.seen[0].body == {
        **same, "max_tokens": 1, "max_completion_tokens": 1, "n": 1, "best_of": 1, "stream": False,
        "kv_transfer_params": {
            "lmcache": {
                "role": "prefill", "transfer_id": transfer_id, "decoder": "tcp://d0:7001",
            }
        },
    }  # fmt: skip


def test_pieces_are_passed_on_as_they_come() -> None:
    prefiller = FakeEngine("p0")
    decoder = FakeEngine("d0", headers=list(SSE), pieces=[b"data: 1\n\n", b"data: [DONE]\n\n"])
    decoder.more.clear()
    with rig([prefiller], [decoder]) as made:
        asked = {"prompt": "hello", "stream": True}
        with made.client.stream("POST", "/v1/completions", json=asked) as answer:
            pieces = answer.iter_raw()
            assert answer.headers["content-type"] == "text/event-stream"
            assert next(pieces) == b"data: 1\n\n", "before the engine has sent the second"
            decoder.more.set()
            assert b"".join(pieces) == b"data: [DONE]\n\n"
        until(made.idle)
        assert made.exchange.counts.requests == {"completed": 1}


def test_an_error_of_the_engine_is_passed_on() -> None:
    prefiller, decoder = pair()
    decoder.status = 400
    prefiller.status = 404
    with rig([prefiller], [decoder]) as made:
        answer = made.complete()
        assert (answer.status_code, answer.json()) == (400, {"from": "d0"})
        until(made.idle)
        assert made.exchange.counts.requests == {"engine_error": 1}
        assert made.complete().status_code == 400, "a client's mistake takes no engine away"
        until(made.idle)
        assert made.client.get("/health").json()["prefill"][0]["healthy"]


def test_a_lost_prefiller_costs_no_answer() -> None:
    decoder = FakeEngine("d0")
    with rig([nowhere()], [decoder]) as made:
        assert made.complete().json() == {"from": "d0"}
        until(lambda: made.exchange.counts.prefills["failed"] == 1 and made.idle())
        assert made.complete().json() == {"from": "d0"}
        assert made.exchange.counts.alone == {"no_prefiller": 1}
    assert decoder.seen[0].transfer["role"] == "decode"
    assert "kv_transfer_params" not in decoder.seen[1].body, "it prefills itself, at once"


@pytest.mark.parametrize("lost", ["answers 500", "hangs up", "breaks off"])
def test_a_prefiller_is_tried_again_after_a_while(lost: str) -> None:
    prefiller, decoder = pair()
    if lost == "answers 500":
        prefiller.status = 500
    with hanging_up() as bad, rig([bad if lost == "hangs up" else prefiller], [decoder]) as made:
        if lost == "breaks off":
            prefiller.dies_after = 1
        made.complete()
        until(lambda: made.exchange.counts.prefills["failed"] == 1 and made.idle())
        made.complete()
        assert made.exchange.counts.alone["no_prefiller"] == 1
        prefiller.status, prefiller.dies_after = 200, None
        made.clock.now_s += 2.0
        made.complete()
        until(made.idle)
        if lost != "hangs up":
            assert made.exchange.counts.prefills == {"failed": 1, "done": 1}
            made.complete()
        assert made.exchange.counts.alone["no_prefiller"] == 1
        until(made.idle)


def test_one_request_tries_a_prefiller_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "_LATE_S", 60.0)
    prefiller, decoder = pair()
    prefiller.status = 500
    with rig([prefiller], [decoder]) as made, ThreadPoolExecutor(1) as pool:
        made.complete()
        until(lambda: made.exchange.counts.prefills["failed"] and made.idle())
        made.clock.now_s += 2.0
        prefiller.status = 200
        prefiller.go.clear()
        decoder.go.clear()
        trial = pool.submit(made.complete)
        until(lambda: len(prefiller.seen) == 2)
        decoder.go.set()
        made.complete()
        assert len(prefiller.seen) == 2, "the second does not wait for the trial"
        prefiller.go.set()
        trial.result()
        until(made.idle)
        made.complete()
        until(lambda: len(prefiller.seen) == 3)


def test_a_frozen_prefiller_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "_LATE_S", 0.01)
    prefiller, decoder = held("p0"), FakeEngine("d0")
    with rig([prefiller], [decoder]) as made:
        for number in range(1, 4):
            assert made.complete().json() == {"from": "d0"}
            until(lambda want=number: made.exchange.counts.prefills["late"] == want)  # type: ignore[misc]
        until(lambda: prefiller.aborted == 3)
        made.complete()
        assert made.exchange.counts.alone == {"no_prefiller": 1}
        made.clock.now_s += 2.0
        made.complete()
        until(lambda: made.exchange.counts.prefills["late"] == 4)
        made.complete()
        assert made.exchange.counts.alone == {"no_prefiller": 2}, "its trial was late as well"


def test_a_decoder_that_is_down_is_replaced() -> None:
    prefiller, decoder = held("p0"), FakeEngine("d1")
    with rig([prefiller], [nowhere(), decoder]) as made:
        assert made.complete().json() == {"from": "d1"}
        counts = made.exchange.counts
        assert counts.decode_retries == 1
        prefiller.go.set()
        until(made.idle)
        assert counts.prefills["cancelled"] == 1, "the one for the first decoder is not wanted"
        assert counts.requests == {"completed": 1}
        made.complete()
        assert counts.decode_retries == 1, "it is left alone for a while"
        until(made.idle)
    last = [seen for seen in prefiller.seen if not seen.aborted]
    assert [seen.transfer["decoder"] for seen in last] == ["tcp://d1:7001"] * 2
    wanted = decoder.seen[0].transfer["transfer_id"]
    assert last[0].transfer["transfer_id"] == wanted
    assert sum(seen.transfer["transfer_id"] == wanted for seen in prefiller.seen) == 1


@pytest.mark.parametrize("how", ["hangs up", "after its headers"])
def test_a_decoder_that_dies_before_its_first_byte_is_replaced(how: str) -> None:
    prefiller, decoder = FakeEngine("p0"), FakeEngine("d1")
    dying = FakeEngine("d0", dies_after=0)
    with hanging_up() as url, rig([prefiller], [url if how == "hangs up" else dying, decoder]) as m:
        assert m.complete().json() == {"from": "d1"}
        assert m.exchange.counts.decode_retries == 1
        until(m.idle)


def test_no_decoder_is_an_error_that_says_so() -> None:
    prefiller = held("p0")
    with rig([prefiller], [nowhere(), nowhere(), nowhere()]) as made:
        answer = made.complete()
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == "no_decoder"
        assert answer.json()["error"]["type"] == "server_error"
        until(made.idle)
        assert made.exchange.counts.requests == {"no_decoder": 1}
        assert made.exchange.counts.decode_retries == 1, "two attempts, not three"


def test_a_decoder_that_failed_is_taken_when_there_is_no_other() -> None:
    prefiller, decoder = pair()
    decoder.dies_after = 0
    with rig([prefiller], [decoder]) as made:
        assert made.complete().status_code == 502
        assert len(decoder.seen) == 1, "no second attempt at the same one"
        assert made.client.get("/health").status_code == 503
        decoder.dies_after = None
        assert made.complete().status_code == 200
        assert made.client.get("/health").status_code == 200
        until(made.idle)


def test_a_decoder_is_well_when_it_begins_to_answer() -> None:
    decoder = FakeEngine("d0", dies_after=0, pieces=[b"one", b"two"])
    with rig([], [decoder]) as made:
        assert made.complete().status_code == 502
        decoder.dies_after = None
        decoder.more.clear()
        made.clock.now_s += 2.0
        with made.client.stream("POST", "/v1/completions", json={}) as answer:
            pieces = answer.iter_raw()
            assert next(pieces) == b"one"
            assert made.client.get("/health").status_code == 200, "its trial takes minutes"
            decoder.more.set()
            assert next(pieces) == b"two"
        until(made.idle)


def test_a_decoder_that_dies_later_breaks_the_stream() -> None:
    prefiller = FakeEngine("p0")
    dying = FakeEngine("d0", headers=list(SSE), pieces=[b"data: 1\n\n", b"x"], dies_after=1)
    other = FakeEngine("d1")
    with rig([prefiller], [dying, other]) as made:
        got = []
        streaming = made.client.stream("POST", "/v1/completions", json={"stream": True})
        with pytest.raises(httpx.RemoteProtocolError), streaming as answer:
            for piece in answer.iter_raw():
                got.append(piece)
        assert got == [b"data: 1\n\n"] and not other.seen, "half an answer is not begun again"
        until(made.idle)
        assert made.exchange.counts.requests == {"broken": 1}


@pytest.mark.parametrize("when", ["before the first byte", "in the stream"])
def test_a_client_that_leaves_ends_both_requests(when: str) -> None:
    prefiller = held("p0")
    decoder = FakeEngine("d0", headers=list(SSE), pieces=[b"data: 1\n\n", b"data: 2\n\n"])
    decoder.more.clear()
    if when == "before the first byte":
        decoder.go.clear()
    with rig([prefiller], [decoder]) as made:
        client = httpx.Client(base_url=made.url, trust_env=False, timeout=0.1)
        streaming = client.stream("POST", "/v1/completions", json={"stream": True})
        with client, pytest.raises(httpx.ReadTimeout), streaming as answer:
            list(answer.iter_raw())
        until(lambda: prefiller.aborted == decoder.aborted == 1, "the engines go on")
        until(made.idle)
        assert made.exchange.counts.requests == {"client_left": 1}
        states = made.exchange.prefillers.states() + made.exchange.decoders.states()
        assert all(state.healthy for state in states)


def test_a_client_that_does_not_read_is_left() -> None:
    decoder = FakeEngine("d0", pieces=[bytes(1 << 20)] * 64)
    with rig([], [decoder], stall_timeout_s=0.1) as made:
        with made.client.stream("POST", "/v1/completions", json={}):
            until(lambda: made.exchange.counts.requests["client_left"] == 1)
        until(made.idle)


def test_the_least_loaded_engines_are_taken() -> None:
    prefillers, decoders = [held("p0"), held("p1")], [held("d0"), held("d1")]
    engines = [*prefillers, *decoders]
    with rig([*prefillers], [*decoders]) as made, ThreadPoolExecutor(8) as pool:
        asking = []

        def ask(prompt: str, want: list[int]) -> None:
            asking.append(pool.submit(made.complete, prompt=prompt))
            until(lambda: [len(engine.seen) for engine in engines] == want)

        ask("x" * 50_000, [1, 0, 1, 0])
        for number in range(1, 5):
            ask("short", [1, number, 1, number])
        for engine in engines:
            engine.go.set()
        assert {answer.result().json()["from"] for answer in asking} == {"d0", "d1"}
        until(made.idle)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": ["a", "b"]}, "several_prompts"),
        ({"prompt": [[1, 2], [3]]}, "several_prompts"),
        ({"n": 2}, "several_answers"),
        ({"best_of": 3}, "several_answers"),
        ({"use_beam_search": True}, "several_answers"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1}, "prompt_logprobs"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ],
)
def test_what_is_no_single_sequence_goes_to_the_decoder_alone(
    fields: dict[str, Any], reason: str
) -> None:
    prefiller, decoder = pair()
    body = {"prompt": "hello", **fields}
    with rig([prefiller], [decoder]) as made:
        assert made.complete(**fields).status_code == 200
        assert made.exchange.counts.alone == {reason: 1}
    assert decoder.seen[0].body == body and not prefiller.seen


@pytest.mark.parametrize("prompt", ["text", ["one"], [1, 2, 3], [[1, 2, 3]]])
def test_one_sequence_is_transferred_however_it_is_written(prompt: Any) -> None:
    prefiller, decoder = pair()
    with rig([prefiller], [decoder]) as made:
        made.complete(prompt=prompt, n=1)
        until(made.idle)
    assert decoder.seen[0].transfer["role"] == "decode"
    assert prefiller.seen[0].body["prompt"] == prompt


def test_a_slot_is_free_again_after_every_kind_of_end() -> None:
    prefiller, decoder = pair()
    with rig([prefiller], [decoder], max_in_flight=1) as made:
        for body in (b"{", b"[]", b"{}", b'{"kv_transfer_params": {}}', b"{}"):
            made.client.post(
                "/v1/completions", content=body, headers={"content-type": "application/json"}
            )
            until(made.idle)
        assert made.exchange.counts.requests == {"completed": 2, "refused": 3}


def test_many_at_once_all_get_their_own_answer() -> None:
    prefillers = [FakeEngine("p0"), FakeEngine("p1")]
    decoders = [FakeEngine("d0"), FakeEngine("d1")]
    with rig([*prefillers], [*decoders]) as made, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda number: made.complete(number=number), range(64)))
        assert all(answer.status_code == 200 for answer in answers)
        until(made.idle)
        ids = [seen.transfer["transfer_id"] for engine in decoders for seen in engine.seen]
        assert len(set(ids)) == 64
        decoder_of = {
            seen.transfer["transfer_id"]: engine.channel for engine in decoders
            for seen in engine.seen
        }  # fmt: skip
        for engine in prefillers:
            for seen in engine.seen:
                assert decoder_of[seen.transfer["transfer_id"]] == seen.transfer["decoder"]


def test_shutting_down_ends_what_prefillers_do() -> None:
    prefiller, decoder = held("p0"), FakeEngine("d0")
    with rig([prefiller], [decoder]) as made:
        made.complete()
        until(lambda: prefiller.seen)
        threads = threading.active_count()
    assert made.idle() and threading.active_count() < threads
    assert made.exchange.counts.prefills["cancelled"] == 1
    assert json.loads(prefiller.seen[0].raw)["max_tokens"] == 1
