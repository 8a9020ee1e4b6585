"""``lmc pd-proxy``: what is wrong with a command line, and a proxy's life."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from pd_proxy_rig import LIMIT_S, FakeEngine, served, until
from typer.testing import CliRunner

from lmcache_core.cli.app import app
from lmcache_core.cli.listening import listen

run = CliRunner().invoke
PREFILL = ["--prefill", "http://127.0.0.1:8100"]
DECODE = ["--decode", "http://127.0.0.1:8200@tcp://127.0.0.1:7001"]


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        ([*PREFILL, "--decode", "http://d:8200"], "names no channel", "@tcp://127.0.0.1:7001"),
        ([*PREFILL, "--decode", "http://d:8200@"], "is no address", "@tcp://127.0.0.1:7001"),
        ([*PREFILL, "--decode", "@tcp://d:7001"], "is no address", "@tcp://127.0.0.1:7001"),
        ([*PREFILL, "--decode", "http://d:8200@tcp://d"], "SCHEME://HOST:PORT", "@tcp://"),
        ([*PREFILL, "--decode", "http://d:8200@tcp://d:x"], "is no address", "@tcp://"),
        ([*PREFILL, "--decode", "tcp://d:8200@tcp://d:1"], "http://HOST:PORT", "@tcp://"),
        (["--prefill", "p:8100", *DECODE], "is no address", "http://127.0.0.1:8100"),
        (["--prefill", "http://p:8100/?a=b", *DECODE], "http://HOST:PORT", "http://127.0.0.1:8100"),
        ([*PREFILL, *PREFILL, *DECODE], "named twice", "once"),
        (
            [*PREFILL, *DECODE, "--decode", "http://d1:8200@tcp://127.0.0.1:7001"],
            "named twice",
            "once",
        ),
        ([*PREFILL, *DECODE, "--max-body-bytes", "lots"], "not a size", "20GiB"),
        ([*PREFILL, *DECODE, "--max-in-flight", "0"], "max_in_flight is 0", "1 or more"),
        ([*PREFILL, *DECODE, "--retry-s", "-1"], "retry_s is -1", "0 to 86400"),
        ([*PREFILL, *DECODE, "--host", "192.0.2.1"], "can't listen at 192.0.2.1", "--host"),
        ([*PREFILL, *DECODE, "--token-file", "/nonexistent/t"], "can't be made", "of your own"),
    ],
)
def test_a_wrong_command_line_is_told_what_helps(
    arguments: list[str], said: str, hint: str
) -> None:
    result = run(app, ["pd-proxy", *arguments])
    assert result.exit_code == 2 and not result.stdout
    error, advice = result.stderr.splitlines()
    assert error.startswith("error: ") and said in error
    assert advice.startswith("hint: ") and hint in advice


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prefill", "http://me:hunter2@p:8100", *DECODE],
        [*PREFILL, "--decode", "http://me:hunter2@d:8200@tcp://d:7001"],
    ],
)
def test_a_password_in_an_address_is_refused_and_not_shown(arguments: list[str]) -> None:
    result = run(app, ["pd-proxy", *arguments])
    assert result.exit_code == 2 and "hunter2" not in result.output
    assert "user or password" in result.stderr


@pytest.mark.parametrize("module", ["starlette.applications", "uvicorn", "httpx"])
def test_the_extra_is_named_when_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    for name in [name for name in sys.modules if name.startswith("lmcache_core.proxy.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    result = run(app, ["pd-proxy", *PREFILL, *DECODE])
    assert result.exit_code == 2
    assert "hint: pip install 'lmcache-core[proxy]'" in result.stderr


def test_lmc_needs_no_extra_for_its_help() -> None:
    code = (
        "import sys\n"
        "for name in ('starlette', 'uvicorn', 'httpx'): sys.modules[name] = None\n"
        "from lmcache_core.cli.app import app\n"
        "app(['pd-proxy', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "URL@CHANNEL" in done.stdout and "Examples:" in done.stdout


def test_small_pieces_do_not_wait_for_acknowledgements() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_it_says_where_it_is_and_drains(tmp_path: Path) -> None:
    prefiller = FakeEngine("p0")
    decoder = FakeEngine("d0", pieces=[b"one", b"two"])
    decoder.more.clear()
    token = tmp_path / "token"
    with served(prefiller) as prefill, served(decoder) as decode:
        command = [
            sys.executable, "-m", "lmcache_core.cli", "pd-proxy", "--prefill", prefill,
            "--decode", f"{decode}@tcp://127.0.0.1:7001", "--port", "0", "--json",
            "--token-file", str(token),
        ]  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
            try:
                facts = json.loads(process.stdout.readline())
                assert facts["event"] == "ready" and facts["pid"] == process.pid
                assert facts["prefill"] == [prefill] and facts["decode"] == [decode]
                headers = {"authorization": f"Bearer {token.read_text().strip()}"}
                client = httpx.Client(base_url=facts["address"], trust_env=False, headers=headers)
                with client, client.stream("POST", "/v1/completions", json={}) as answer:
                    pieces = answer.iter_raw()
                    assert next(pieces) == b"one"
                    process.send_signal(signal.SIGTERM)
                    until(lambda: _refuses(facts["address"]))
                    decoder.more.set()
                    assert b"".join(pieces) == b"two", "what runs may end"
                assert process.wait(LIMIT_S) == 0
                assert process.stderr.read() == ""
            finally:
                process.kill()


def _refuses(address: str) -> bool:
    try:
        httpx.get(f"{address}/health", trust_env=False)
    except httpx.ConnectError:
        return True
    return False
