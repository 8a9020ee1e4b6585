"""The connector across processes: vLLM's multiprocessing, and the API server over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import random_tokens

HERE = Path(__file__).parent
PROMPT = random_tokens(21, 700)
CHILD = """
import json, sys
from conftest import Engine, cached
model, extra, prompt, times, *options = json.loads(sys.argv[1])
if __name__ == "__main__":
    engine = Engine(model, extra, **(options[0] if options else {}))
    outputs = [engine.run([prompt])[0] for _ in range(times)]
    rows = [(list(o.outputs[0].token_ids), o.num_cached_tokens,
             cached(o) if extra else {}) for o in outputs]
    print("RESULT " + json.dumps(rows), flush=True)
    engine.close()
"""


def run_child(
    tmp_path: Path, multiprocessing: int, *args: Any, env: dict[str, str] | None = None
) -> list[Any]:
    """An engine in a process of its own.

    Args:
        args: model, extra configuration or None, prompt, how often it is asked, further options.

    Returns:
        Tokens, cached tokens and their tiers, of each answer.
    """
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    variables = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(multiprocessing),
        "PYTHONPATH": str(HERE),
        **(env or {}),
    }
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(args)],
        env=variables, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return list(json.loads(line[7:]))
    raise AssertionError(done.stdout[-2000:] + done.stderr[-4000:])


@pytest.mark.slow
def test_engine_core_and_worker_in_processes_of_their_own(
    tmp_path: Path, llama: Path, extra: dict[str, Any]
) -> None:
    (reference,) = run_child(tmp_path, 0, str(llama), None, PROMPT, 1)
    cold, warm = run_child(tmp_path, 1, str(llama), extra, PROMPT, 2)
    assert (cold[0], cold[1]) == (reference[0], 0)
    assert warm == [reference[0], 512, {"host": 512}]
    (restart,) = run_child(tmp_path, 1, str(llama), extra, PROMPT, 1)
    assert restart == [reference[0], 512, {"disk": 512}]


class Server:
    """vLLM's API server in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, directory: Path) -> None:
        self._process, self._port, self._directory = process, port, directory

    def complete(self, **headers: str) -> dict[str, Any]:
        """Its answer to `PROMPT`, when it is up."""
        model = str(self._directory / "model")
        body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **named},
        )
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return dict(json.loads(answer.read()))
            except (ConnectionError, urllib.error.URLError):
                alive = self._process.poll() is None and time.monotonic() < end
                assert alive, (self._directory / "server.log").read_text()[-4000:]
                time.sleep(0.5)

    def scrape(self, *, engine: int = 0) -> dict[tuple[str, str], float]:
        """Our series of one engine on vLLM's own endpoint, by name and tier."""
        from prometheus_client.parser import text_string_to_metric_families

        url = f"http://127.0.0.1:{self._port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            text = answer.read().decode()
        return {
            (sample.name, sample.labels.get("tier", "")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("lmcache") and sample.labels["engine"] == str(engine)
        }


@contextlib.contextmanager
def api_server(tmp_path: Path, extra: dict[str, Any], *options: str) -> Iterator[Server]:
    """vLLM's API server of a tiny model, with ``options``."""
    from lmcache_core.demo.models import make_tiny

    make_tiny(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    transfer = {
        "kv_connector": "LMCacheCoreConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(tmp_path / "model"), "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096",
        "--no-enable-prefix-caching", "--kv-transfer-config", json.dumps(transfer), *options,
    ]  # fmt: skip
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield Server(server, port, tmp_path)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


@pytest.mark.slow
def test_the_api_server_finds_the_connector_by_name(tmp_path: Path, extra: dict[str, Any]) -> None:
    with api_server(tmp_path, extra) as server:
        first = server.complete()
        second = server.complete()
        server.complete()
        metrics = server.scrape()
    assert second["choices"][0]["text"] == first["choices"][0]["text"]
    assert first["kv_transfer_params"]["lmcache"]["cached_tokens"] == {}
    assert second["kv_transfer_params"]["lmcache"]["cached_tokens"] == {"host": 512}
    assert metrics["lmcache:num_hit_tokens_total", "host"] >= 512
    assert metrics["lmcache:num_requested_tokens_total", ""] >= 1400
    assert metrics["lmcache:num_stored_tokens_total", ""] == 512
    assert metrics["lmcache:local_cache_usage", ""] > 0
    assert metrics["lmcache_core:copied_bytes_total", ""] > 0
    assert metrics["lmcache_core:tier_writes_total", "disk"] == 2
    assert metrics["lmcache:time_to_lookup_count", ""] >= 2
