"""Who may ask, how much, and what for; and what bad input costs."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from controller_rig import INSTANCE_TOKEN, TOKEN, Rig, keys_of, model, prompt, rig, until

from lmcache_core.agent import wire
from lmcache_core.controller import messages, openapi
from lmcache_core.controller.app import CSP
from lmcache_core.controller.metrics import SERIES_NAMES
from lmcache_core.controller.table import OPERATIONS

OPEN = {"alive", "openapi"}
FOR_INSTANCES = {"metrics", "sync", "where"}


def problem(answer: httpx.Response, status: int) -> messages.ErrorBody:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    found = msgspec.json.decode(answer.content, type=messages.Problem).error
    assert found.code and found.message
    return found


def call(client: httpx.Client, operation: Any, **options: Any) -> httpx.Response:
    path = operation.path.replace(":path}", "}")
    for name in ("name", "id", "request_id"):
        path = path.replace("{" + name + "}", "x")
    return client.request(operation.method, path, **options)


# Tokens.


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": TOKEN},
        {"authorization": "Bearer"},
        {"authorization": "Bearer \xe4".encode("latin-1")},
    ],
)
def test_nothing_is_done_without_the_token(headers: dict[str, Any]) -> None:
    with rig() as made, httpx.Client(base_url=made.url, headers=headers, trust_env=False) as client:
        for operation in OPERATIONS:
            if operation.name not in OPEN:
                answer = call(client, operation)
                assert problem(answer, 401).code == "invalid_token"
                assert answer.headers["www-authenticate"] == "Bearer"


def test_the_token_of_instances_is_good_for_what_they_say_only() -> None:
    with rig() as made:
        client = made.made_client(INSTANCE_TOKEN)
        for operation in OPERATIONS:
            status = call(client, operation).status_code
            if operation.name in OPEN | FOR_INSTANCES:
                assert status != 401, operation.name
            else:
                assert status == 401, operation.name
        instance = made.instance(token=TOKEN)
        assert instance.sync() is not None, "operators may stand in for instances"


def test_what_everybody_may_see_tells_nothing() -> None:
    with rig() as made:
        made.instance("secret-name").sync()
        with httpx.Client(base_url=made.url, trust_env=False) as client:
            assert client.get("/healthz").json() == {"status": "ok"}
            assert "secret-name" not in client.get("/openapi.json").text


# Names, methods, types.


@pytest.mark.parametrize("host", ["evil.example", "", "127.0.0.1.evil.example", "localhost@x"])
def test_a_strangers_name_is_refused(host: str) -> None:
    with rig() as made:
        for path in ("/", "/v1/health", "/openapi.json", "/nowhere"):
            answer = made.client.get(path, headers={"host": host})
            assert problem(answer, 421).code == "unknown_host"
        assert made.client.get("/healthz", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:9300", "kv.example:1"]
)
def test_our_names_are_known(host: str) -> None:
    with rig(allowed_hosts=("KV.example",)) as made:
        assert made.client.get("/v1/health", headers={"host": host}).status_code == 200


def test_another_method_is_told_which_are_good() -> None:
    with rig() as made:
        answer = made.client.put("/v1/pins", json={})
        problem(answer, 405)
        assert answer.headers["allow"] == "GET, POST"
        problem(made.client.get("/v2/health"), 404)
        problem(made.client.get("/v1/health/"), 404)
        preflight = made.client.options("/v1/pins", headers={"origin": "http://evil.example"})
        assert preflight.status_code == 405
        assert not any(name.startswith("access-control") for name in preflight.headers)


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded"])
def test_a_body_of_another_type_is_refused(kind: str) -> None:
    with rig() as made:
        headers = {"content-type": kind}
        for path, body in (("/v1/clear", b'{"select": {"all": true}}'), ("/v1/sync", b"")):
            answer = made.client.post(path, content=body, headers=headers)
            problem(answer, 415)
        encoded = {"content-type": "application/json", "content-encoding": "gzip"}
        problem(made.client.post("/v1/clear", content=b"x", headers=encoded), 415)
        typed = {"content-type": "application/json; charset=utf-8"}
        answer = made.client.post("/v1/lookup", content=b"{}", headers=typed)
        problem(answer, 422)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff", 400),
        (b"[" * 100_000, 422),
        (b'{"select":' * 100_000, 422),
        (b'{"select": {"text": "\\ud800"}}', 400),
        (b"null", 422),
        (b"{}", 422),
        (b'{"select": {"tokens": [99999999999999999999999]}}', 422),
        (b'{"select": {"all": true}, "other": 1}', 422),
    ],
)
def test_a_malformed_body_is_refused(body: bytes, status: int) -> None:
    with rig() as made:
        headers = {"content-type": "application/json"}
        problem(made.client.post("/v1/clear", content=body, headers=headers), status)
        assert made.get("/v1/health")["status"] == "ok"


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "limit=x", "limit=1&limit=2", "other=1", "state=no", "limit=1.5"],
)
def test_a_wrong_parameter_is_refused(query: str) -> None:
    with rig() as made:
        problem(made.client.get(f"/v1/jobs?{query}"), 422)


@pytest.mark.parametrize("wait_s", ["31", "-1", "nan", "inf", ""])
def test_nobody_waits_for_longer_than_allowed(wait_s: str) -> None:
    with rig() as made:
        problem(made.client.get(f"/v1/jobs/x?wait_s={wait_s}"), 422)


# How much.


def test_a_body_of_100_mb_is_refused_before_it_is_read() -> None:
    with rig(max_body_bytes=1 << 20) as made:
        body = b" " * (100 << 20)
        headers = {"content-type": "application/json"}
        assert problem(made.client.post("/v1/clear", content=body, headers=headers), 413).message
        sync = made.client.post(
            "/v1/sync", content=body, headers={"content-type": wire.CONTENT_TYPE}
        )
        problem(sync, 413)
        assert made.get("/v1/health")["status"] == "ok"


def test_a_body_that_does_not_say_how_long_it_is_ends_at_the_limit() -> None:
    sent = []

    def pieces() -> Iterator[bytes]:
        for number in range(200):
            sent.append(number)
            yield b" " * (1 << 20)

    with rig(max_body_bytes=4 << 20) as made:
        headers = {"content-type": "application/json"}
        try:
            answer = made.client.post("/v1/clear", content=pieces(), headers=headers)
            problem(answer, 413)
        except httpx.TransportError:
            pass  # the connection was closed while it was sending
        assert len(sent) < 200
        assert made.get("/v1/health")["status"] == "ok"


def test_all_bodies_together_are_bounded() -> None:
    with rig(max_body_bytes=1 << 20, max_held_body_bytes=100) as made:
        answer = made.client.post("/v1/clear", json={"select": {"text": "x" * 200}})
        assert problem(answer, 503).code == "busy" and answer.headers["retry-after"]
        problem(made.client.post("/v1/clear", json={"select": {"all": 1}}), 422)


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with rig(body_timeout_s=0.1) as made:
        host, port = made.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(
                b"POST /v1/clear HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{" % TOKEN.encode()
            )
            assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_too_many_requests_are_told_to_come_again() -> None:
    with rig(max_in_flight=1) as made:
        made.instance(models=(model(),)).sync()
        job = made.post("/v1/clear", {"select": {"all": True}})["id"]
        waiting = threading.Thread(target=lambda: made.job(job, wait_s=20))
        waiting.start()
        until(lambda: made.controller.jobs._changed)
        answer = made.made_client(TOKEN).get("/v1/health")
        assert problem(answer, 503).code == "busy" and answer.headers["retry-after"] == "1"
        assert made.made_client(INSTANCE_TOKEN).get("/healthz").status_code == 200
        instance = made.instance(models=(model(),))
        instance.greeted = True
        instance.obey()
        waiting.join(10)
        assert made.get("/v1/health")["status"] == "ok"


@pytest.mark.slow
def test_ten_thousand_pins_and_no_more() -> None:
    with rig() as made:
        served = model()
        instance = made.instance(models=(served,))
        instance.sync()
        body = {
            "select": {"keys": [keys_of(served, prompt(1))[0].hex()]}, "owner": "me",
            "ttl_s": 60, "instances": ["i0"],
        }  # fmt: skip
        made_ = 0
        while made_ < 10_000:
            answer = made.client.post("/v1/pins", json=body)
            made_ += answer.status_code == 201
            if answer.status_code == 429:  # jobs are bounded too
                orders = instance.take(0.0)
                ends = tuple(wire.Progress(id=order.id, state="done") for order in orders)
                instance.sync(progress=ends)
            else:
                assert answer.status_code == 201, answer.text
        until(lambda: made.client.post("/v1/pins", json=body).status_code == 409)
        assert len(made.get("/v1/pins")["pins"]) == 10_000
        start_s = time.monotonic()
        instance.sync()
        assert time.monotonic() - start_s < 1


# What is shown, and what never is.


def test_every_answer_is_kept_from_other_pages() -> None:
    with rig() as made:
        for path in ("/v1/health", "/nowhere", "/healthz", "/"):
            headers = made.client.get(path).headers
            assert headers["content-security-policy"] == CSP
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["cache-control"] in ("no-store", "no-cache")
            assert "set-cookie" not in headers and "server" not in headers
            assert not any(name.startswith("access-control") for name in headers)


def test_the_page_and_its_files_and_no_others() -> None:
    folder = resources.files("lmcache_core.controller") / "web"
    with rig() as made, httpx.Client(base_url=made.url, trust_env=False) as client:
        page = client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.content == (folder / "index.html").read_bytes()
        for name, kind in (("app.js", "text/javascript"), ("style.css", "text/css")):
            answer = client.get(f"/web/{name}")
            assert answer.headers["content-type"].startswith(kind)
            assert answer.content == (folder / name).read_bytes()
        for name in ("no.js", "../api.py", "..%2fapi.py", "%2e%2e/api.py", "", "./"):
            assert client.get(f"/web/{name}").status_code == 404, name


def test_no_token_no_salt_and_no_token_ids_are_logged_or_shown(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from lmcache_core.controller.state_sqlite import SqliteState

    caplog.set_level(logging.DEBUG)
    path = tmp_path / "state"
    with rig(SqliteState(str(path))) as made:
        served = model()
        instance = made.instance(models=(served,))
        instance.sync()
        select = {"tokens": [987_654_321] * 16, "tenant": "hush-hush", "model": "m"}
        shown = [
            json.dumps(made.post("/v1/lookup", {"select": select})),
            json.dumps(made.post("/v1/clear", {"select": select}, key="a-key")),
            json.dumps(
                made.post("/v1/pins", {"select": select, "owner": "me", "ttl_s": 9,
                                       "instances": ["i0"]})
            ),
            made.client.put("/v1/quotas", json={"bytes": 1, "tenant": "hush-hush"}).text,
        ]  # fmt: skip
        for path_ in ("/v1/jobs", "/v1/pins", "/v1/quotas", "/v1/usage", "/metrics", "/v1/health"):
            shown.append(made.client.get(path_).text)
        bad = made.client.post("/v1/clear", json={"select": {**select, "tenant": ["hush-hush"]}})
        shown.append(bad.text)
    for secret in ("hush-hush", TOKEN, INSTANCE_TOKEN, "987654321"):
        assert not any(secret in text for text in shown), secret
        logged = [record for record in caplog.records if record.name != "httpx"]
        assert not any(secret in record.getMessage() for record in logged), secret
        for file in tmp_path.iterdir():
            assert secret.encode() not in file.read_bytes(), secret


def test_a_bug_is_one_answer_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    with rig() as made:
        made.controller.history.shown = None  # type: ignore[assignment, method-assign]
        found = problem(made.client.get("/v1/history"), 500)
        assert "NoneType" not in found.message
        assert made.get("/v1/health")["status"] == "ok"
        assert _text(made, "errors_total") == 1
    assert any("operation=history" in record.getMessage() for record in caplog.records)


# What programs read.


def _text(made: Rig, name: str) -> float:
    lines = made.client.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(
        f"lmcache_core:controller_{name} "))  # fmt: skip


def test_every_series_is_there() -> None:
    with rig() as made:
        made.instance().sync()
        text = made.client.get("/metrics").text
        for name in SERIES_NAMES:
            assert f"# TYPE {name} " in text
        assert 'lmcache_core:controller_instances{state="live"} 1' in text
        assert 'requests_total{operation="sync",status="200"} 1' in text
        assert 'request_seconds_bucket{operation="sync",le="+Inf"} 1' in text


def test_every_operation_is_in_the_documents() -> None:
    document = openapi.document("1")
    reference = openapi.reference_markdown()
    for operation in OPERATIONS:
        path = operation.path.replace(":path}", "}")
        described = document["paths"][path][operation.method.lower()]
        assert described["operationId"] == operation.name
        assert str(operation.status) in described["responses"]
        assert f"| {operation.method} | `{path}`" in reference
    assert len({operation.name for operation in OPERATIONS}) == len(OPERATIONS)


def test_examples_are_what_they_are_examples_of() -> None:
    for operation in OPERATIONS:
        if operation.example is not None:
            msgspec.convert(operation.example, operation.body)
