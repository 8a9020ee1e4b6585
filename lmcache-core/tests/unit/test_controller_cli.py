"""``lmc controller``: what is wrong with a command line, and a controller's life."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import typer.main
from controller_redis import redis_server
from pd_proxy_rig import LIMIT_S, until
from typer.testing import CliRunner

from lmcache_core import controller as controller_package
from lmcache_core.agent import wire
from lmcache_core.cli.app import app
from lmcache_core.controller.state_sqlite import SqliteState

run = CliRunner().invoke


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the defaults are."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "lmcache-core"


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A controller that said that it is ready, and what it said."""
    command = [
        sys.executable, "-m", "lmcache_core.cli", "controller", "--port", "0", "--json", *arguments
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield process, json.loads(line)
        finally:
            process.kill()


def client_of(facts: dict[str, Any], **options: Any) -> httpx.Client:
    token = Path(facts["token_file"]).read_text().strip()
    headers = {"authorization": f"Bearer {token}"}
    return httpx.Client(
        base_url=facts["address"], trust_env=False, headers=headers, timeout=LIMIT_S, **options
    )


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (["--host", "192.0.2.1"], "can't listen at 192.0.2.1", "--host"),
        (["--state", "http://x"], "no kind of state", "redis://"),
        (["--state", "/nonexistent/s"], "can't be opened", "--state"),
        (["--token-file", "/nonexistent/t"], "can't be made", "of your own"),
        (["--max-body-bytes", "lots"], "not a size", "20GiB"),
        (["--max-pins", "0"], "max_pins is 0", "more than 0"),
        (["--lease-s", "-1"], "lease_s is -1", "more than 0"),
        (["--lease-s", "nan"], "lease_s is nan", "less"),
        (["--tls-cert", "c.pem"], "go together", "both"),
        (["--tls-cert", "/nonexistent", "--tls-key", "/nonexistent"], "can't be used", "PEM"),
    ],
)
def test_a_wrong_command_line_is_told_what_helps(
    home: Path, arguments: list[str], said: str, hint: str
) -> None:
    result = run(app, ["controller", "--port", "0", *arguments])
    assert result.exit_code == 2 and not result.stdout
    error, advice = result.stderr.splitlines()
    assert error.startswith("error: ") and said in error
    assert advice.startswith("hint: ") and hint in advice


def test_a_state_that_another_controller_has(home: Path, tmp_path: Path) -> None:
    with contextlib.closing(SqliteState(str(tmp_path / "s"))):
        result = run(app, ["controller", "--port", "0", "--state", str(tmp_path / "s")])
    assert result.exit_code == 2 and "another controller has the state" in result.stderr


def test_one_token_for_both_is_refused(home: Path, tmp_path: Path) -> None:
    token = str(tmp_path / "t")
    arguments = ["--token-file", token, "--instance-token-file", token]
    result = run(app, ["controller", "--port", "0", *arguments])
    assert result.exit_code == 2 and "another one for instances" in result.stderr


@pytest.mark.parametrize("module", ["starlette.applications", "uvicorn"])
def test_the_extra_is_named_when_it_is_missing(
    home: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    for name in [name for name in sys.modules if name.startswith("lmcache_core.controller.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    result = run(app, ["controller", "--port", "0"])
    assert result.exit_code == 2
    assert "hint: pip install 'lmcache-core[controller]'" in result.stderr


def test_lmc_needs_no_extra_for_its_help() -> None:
    code = (
        "import sys\n"
        "for name in ('starlette', 'uvicorn', 'httpx', 'redis'): sys.modules[name] = None\n"
        "from lmcache_core.cli.app import app\n"
        "app(['controller', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--instance-token" in done.stdout and "Examples:" in done.stdout


def test_it_says_where_it_is_and_keeps_its_files_to_itself(home: Path) -> None:
    os.umask(0o022)
    with started() as (process, facts):
        assert facts["event"] == "ready" and facts["pid"] == process.pid
        assert facts["token_file"] == str(home / "controller.token")
        assert facts["state"] == str(home / "controller.sqlite")
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        for file in home.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
        with client_of(facts) as client:
            assert client.get("/v1/health").json()["status"] == "ok"
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0
        assert process.stderr is not None and process.stderr.read() == ""


def test_who_waits_is_answered_when_it_ends(home: Path) -> None:
    sync = wire.Sync(
        version=wire.VERSION, instance="i", incarnation="p", kind="engine", seq=1, reset=True,
        status=wire.Status("1", 1, 1.0),
    )  # fmt: skip
    with started() as (process, facts), client_of(facts) as client:
        headers = {"content-type": wire.CONTENT_TYPE}

        def say(wait_s: float) -> int:
            body = msgspec.msgpack.encode(msgspec.structs.replace(sync, wait_s=wait_s))
            return client.post(wire.PATH, content=body, headers=headers).status_code

        assert say(0.0) == 200
        statuses: list[int] = []
        waiting = threading.Thread(target=lambda: statuses.append(say(30.0)))
        waiting.start()
        with client_of(facts) as other:
            until(lambda: "controller_in_flight 2" in other.get("/metrics").text)
        process.send_signal(signal.SIGTERM)
        waiting.join(LIMIT_S)
        assert statuses == [200]
        assert process.wait(LIMIT_S) == 0


def test_it_speaks_tls(home: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out",
         str(cert)], capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl makes no certificate here")
    with started("--tls-cert", str(cert), "--tls-key", str(key)) as (_, facts):
        assert facts["address"].startswith("https://")
        with client_of(facts, verify=ssl.create_default_context(cafile=str(cert))) as client:
            assert client.get("/v1/health").status_code == 200


def test_an_open_address_without_tls_is_warned_of(home: Path) -> None:
    with started("--host", "0.0.0.0", "--allow-host", "kv.example") as (process, facts):
        with client_of({**facts, "address": facts["address"].replace("0.0.0.0", "127.0.0.1")}) as c:
            assert c.get("/v1/health", headers={"host": "kv.example"}).status_code == 200
            assert c.get("/v1/health", headers={"host": "0.0.0.0"}).status_code == 421
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0
        assert process.stderr is not None and "unencrypted" in process.stderr.read()


def test_a_password_of_redis_is_not_shown(home: Path) -> None:
    with redis_server() as server:
        url = server.url.replace("redis://", "redis://me:hunter2@")
        result = run(app, ["controller", "--port", "0", "--state", url])
        assert result.exit_code == 2 and "hunter2" not in result.output
        assert "refuses us" in result.stderr
        with started("--state", server.url) as (_, facts), client_of(facts) as client:
            assert client.get("/v1/health").json()["state"] == server.url


def test_every_option_that_a_hint_names_is_there() -> None:
    package = Path(controller_package.__file__).parent
    named = {
        option
        for path in package.glob("*.py")
        for option in re.findall(r"--[a-z][a-z-]+", path.read_text())
    }
    command = typer.main.get_command(app).commands["controller"]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in parameter.opts}
    assert len(named) > 8 and not named - known
