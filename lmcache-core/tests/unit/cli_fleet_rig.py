"""A controller that answers by a script, for the tests of ``lmc``'s fleet commands."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec
import pytest
from typer.testing import CliRunner, Result

from lmcache_core.cli.app import app
from lmcache_core.controller.messages import ErrorBody, Job, Part, Problem

TOKEN = "0123456789abcdef0123456789abcdef"
KEY = "ab" * 46
LIMIT_S = 10.0


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def key(self) -> str:
        return self.headers.get("idempotency-key", "")


@dataclass(frozen=True)
class Says:
    """One answer; ``hold`` keeps it back until it is set; no status drops the connection."""

    status: int | None
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    hold: threading.Event | None = None


def says(value: object, status: int = 200, **headers: str) -> Says:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Says(status, msgspec.json.encode(value), named)


def refuses(
    status: int, code: str, message: str = "no", hint: str = "do it right", **headers: str
) -> Says:
    body = ErrorBody(code=code, message=message, hint=hint)
    return says(Problem(error=body), status, **headers)


class FakeController:
    """Answers ``(method, path)`` by the next of its script; the last one stays."""

    def __init__(self) -> None:
        self.script: dict[tuple[str, str], list[Says]] = defaultdict(list)
        self.asked: list[Asked] = []
        self.url = ""

    def on(self, method: str, path: str, *answers: Says | object) -> None:
        made = [one if isinstance(one, Says) else says(one) for one in answers]
        self.script[method, path] = made

    def take(self, asked: Asked) -> Says:
        self.asked.append(asked)
        left = self.script[asked.method, asked.path]
        if not left:
            return refuses(404, "not_found", f"nothing at {asked.path}")
        return left.pop(0) if len(left) > 1 else left[0]

    def asked_for(self, method: str, path: str) -> list[Asked]:
        return [one for one in self.asked if (one.method, one.path) == (method, path)]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a connection that broke off: ``lmc`` in this process writes to the same
        stderr."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def served(
    controller: FakeController, *, certificate: tuple[str, str] | None = None
) -> Iterator[FakeController]:
    """On a free port of loopback, over TLS with ``certificate``: files of it and of its key."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = LIMIT_S

        def log_message(self, *args: object) -> None:
            pass

        def answer(self) -> None:
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            query = dict(parse_qsl(parts.query))
            said = controller.take(Asked(self.command, parts.path, query, headers, body))
            if said.hold is not None:
                said.hold.wait(LIMIT_S)
            if said.status is None:
                self.close_connection = True
                return
            # A 204 has no body (RFC 9110, 15.3.5), and a reader would reset what it left unread.
            content = b"" if said.status == 204 else said.body
            with contextlib.suppress(ConnectionError):  # who asked may be gone
                self.send_response(said.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = answer

    server = Server(("127.0.0.1", 0), Handler)
    scheme = "http"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        # The handshake is the handler's: one that fails must not hold the others.
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        scheme = "https"
    controller.url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield controller
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeController]:
    """One controller, which variables name."""
    token = tmp_path / "controller.token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    monkeypatch.setenv("LMCACHE_CONTROLLER_TOKEN_FILE", str(token))
    monkeypatch.delenv("LMCACHE_TENANT", raising=False)
    with served(FakeController()) as found:
        monkeypatch.setenv("LMCACHE_CONTROLLERS", found.url)
        yield found


def lmc(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin, env={"COLUMNS": "200"})


def job(state: str = "done", **changes: Any) -> Job:
    part = Part(number=0, instance="e0", op="clear", state="done", total=4, settled=4, bytes=2048)
    fields: dict[str, Any] = {"id": "j1", "kind": "clear", "made_s": 1.0, "parts": [part]}
    fields |= {"ended_s": None if state == "running" else 3.5, "total": 4, "settled": 4}
    return Job(**{**fields, "state": state, "bytes": 2048, **changes})


def until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < end_s, "did not come in time"
        time.sleep(0.005)


@contextlib.contextmanager
def lmc_process(*line: str, terminal: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """``lmc`` in a process of its own; its three files are ``terminal``, if there is one.

    It can be interrupted also where these tests run in the background and a shell ignores SIGINT.
    """
    files: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if terminal is not None:
        files = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    command = [sys.executable, "-m", "lmcache_core.cli", *line]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # "ignored" is inherited
    try:
        started = subprocess.Popen(command, **files)
    finally:
        signal.signal(signal.SIGINT, before)
    with started as process:
        try:
            yield process
        finally:
            process.kill()


def on_terminal(*line: str, types: bytes = b"") -> tuple[int, str]:
    """Exit code of ``lmc`` on a terminal, and what it showed; ``types`` answers its question."""
    ours, theirs = pty.openpty()
    shown = b""
    with lmc_process(*line, terminal=theirs) as process:
        os.close(theirs)
        while True:
            ready, _, _ = select.select([ours], [], [], LIMIT_S)
            assert ready, shown
            try:
                piece = os.read(ours, 65536)
            except OSError:  # what a terminal says when nobody has it open any more
                break
            shown += piece
            if types and b"Clear it?" in shown:
                os.write(ours, types)
                types = b""
            if not piece:
                break
        code = process.wait(LIMIT_S)
    os.close(ours)
    return code, shown.decode().replace("\r\n", "\n")


CLEAR = ["clear", "--model", "llama", "--yes"]
DROPPED = Says(None)
