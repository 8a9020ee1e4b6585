"""``lmc pd-proxy``: what a client may ask, and what the proxy tells of itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from pd_proxy_rig import FakeEngine, nowhere, rig, until

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        ('{"prompt": "x"}'.encode("utf-16"), "invalid_json"),
        (b"[" * 200_000, "invalid_json"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "invalid_json"),
        (b'{"kv_transfer_params": {"lmcache": {}}}', "forbidden_parameter"),
        (b'{"kv_transfer_params": null}', "forbidden_parameter"),
        (b'{"kv\\u005ftransfer_params": {}, "a": 1}', "forbidden_parameter"),
        (b'{"vllm_xargs": {"kv_transfer_params": "x"}}', "forbidden_parameter"),
    ],
)
def test_a_wrong_body_is_refused(body: bytes, code: str) -> None:
    decoder = FakeEngine("d0")
    with rig([], [decoder]) as made:
        answer = made.client.post("/v1/chat/completions", content=body, headers=JSON)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, code)
        assert error["type"] == "invalid_request_error" and error["message"]
        assert made.exchange.counts.requests == {"refused": 1} and not decoder.seen


def test_a_body_is_bounded_whether_its_size_is_told_or_not() -> None:
    decoder = FakeEngine("d0")

    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        yield b"x" * 1000
        yield b'"}'

    with rig([], [decoder], max_body_bytes=1000) as made:
        for content in (b" " * 1001, pieces()):
            answer = made.client.post("/v1/completions", content=content, headers=JSON)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_large"
        assert not decoder.seen
        exact = json.dumps({"prompt": "x" * (1000 - 14)}).encode()
        assert len(exact) == 1000
        assert made.client.post("/v1/completions", content=exact, headers=JSON).is_success


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_page_of_a_stranger_can_ask_nothing(kind: str) -> None:
    decoder = FakeEngine("d0")
    with rig([], [decoder]) as made:
        headers = {"content-type": kind} if kind else {}
        answer = made.client.post("/v1/completions", content=b"{}", headers=headers)
        assert answer.status_code == 415 and not decoder.seen


def test_too_many_are_told_to_come_again() -> None:
    decoder = FakeEngine("d0")
    decoder.go.clear()
    with rig([], [decoder], max_in_flight=2) as made, ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(made.complete) for _ in range(2)]
        until(lambda: len(decoder.seen) == 2)
        answer = made.complete()
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        decoder.go.set()
        assert all(done.result().is_success for done in asking)
        until(made.idle)
        assert made.complete().is_success
        until(made.idle)
        assert made.exchange.counts.requests == {"completed": 3, "busy": 1}


def test_the_token_is_asked_where_there_is_one() -> None:
    decoder = FakeEngine("d0")
    with rig([], [decoder], token="t" * 32) as made:
        good = {"authorization": "bearer " + "t" * 32}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "t" * 32}):
            answer = made.client.post("/v1/completions", json={}, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert made.client.get("/metrics", headers=headers).status_code == 401
            assert made.client.get("/v1/models", headers=headers).status_code == 401
            assert made.client.get("/health", headers=headers).json() == {"status": "ok"}
        assert not decoder.seen
        assert made.client.post("/v1/completions", json={}, headers=good).is_success
        assert decoder.seen[0].headers["authorization"] == good["authorization"]
        assert "decode" in made.client.get("/health", headers=good).json()
        assert made.client.get("/metrics", headers=good).is_success


def test_models_are_a_decoders() -> None:
    decoder = FakeEngine("d1")
    with rig([], [nowhere(), decoder]) as made:
        answer = made.client.get("/v1/models", headers={"authorization": "Bearer sk-1"})
        assert answer.json() == {"from": "d1"}
        assert decoder.seen[0].path == "/v1/models" and not decoder.seen[0].raw
        assert decoder.seen[0].headers["authorization"] == "Bearer sk-1"


def test_health_shows_every_engine() -> None:
    prefiller, decoder = FakeEngine("p0"), FakeEngine("d0")
    lost = nowhere()
    with rig([prefiller], [lost, decoder]) as made:
        made.complete()
        until(made.idle)
        answer = made.client.get("/health")
        assert answer.status_code == 200
        assert answer.json() == {
            "status": "ok",
            "prefill": [{"url": prefiller.url, "healthy": True, "in_flight": 0}],
            "decode": [
                {"url": lost, "healthy": False, "in_flight": 0},
                {"url": decoder.url, "healthy": True, "in_flight": 0},
            ],
        }


def test_metrics_are_what_prometheus_reads() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    prefiller, decoder = FakeEngine("p0"), FakeEngine("d0")
    with rig([prefiller], [nowhere(), decoder]) as made:
        made.complete()
        made.complete(n=2)
        made.client.post("/v1/completions", content=b"{", headers=JSON)
        until(made.idle)
        text = made.client.get("/metrics").text
        cancelled = made.exchange.counts.prefills["cancelled"]
    samples = {
        (sample.name.removeprefix("lmcache_core:pd_proxy_"), *sample.labels.values()): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["requests_total", "completed"] == 2
    assert samples["requests_total", "refused"] == 1
    assert samples["alone_total", "several_answers"] == 1
    assert samples["prefills_total", "done"] == 1
    assert samples["prefills_total", "cancelled"] == cancelled == 1
    assert samples["decode_retries_total",] == 1
    assert samples["in_flight",] == 0
    assert samples["engine_healthy", "decode", decoder.url] == 1
    assert samples["engine_in_flight", "prefill", prefiller.url] == 0
    assert sorted(v for (name, *_), v in samples.items() if name == "engine_healthy") == [0, 1, 1]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/v1/completions"),
        ("POST", "/v1/models"),
        ("POST", "/v1/embeddings"),
        ("GET", "/health/"),
        ("GET", "/docs"),
    ],
)
def test_everything_else_is_not_there(method: str, path: str) -> None:
    with rig([], [FakeEngine("d0")]) as made:
        answer = made.client.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
