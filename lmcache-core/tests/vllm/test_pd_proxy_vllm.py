"""`lmc pd-proxy` before two real API servers, a prefiller and a decoder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import random_tokens
from pd_engines import CHUNK, Engine, moved, until

START_LIMIT_S = 150.0
DEADLINE_S = 3.0
PROMPTS = [random_tokens(400, 1000), random_tokens(401, 700)]
ANSWER_TOKENS = 16


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Process:
    """A process with all that it starts; its output goes to a file."""

    def __init__(self, log: Path, *command: str) -> None:
        self.log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def terminate(self) -> int:
        """The status that it ends with."""
        self._process.terminate()
        return self._process.wait(30)


class Server(Process):
    """An API server with its engine."""

    def __init__(self, directory: Path, role: str, channel_port: int) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.channel = f"tcp://127.0.0.1:{channel_port}"
        transfer = {
            "kv_connector": "LMCacheCoreConnector",
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "chunk_size": CHUNK,
                "host_bytes": "128MiB",
                "channel": self.channel,
                "channel_token_file": str(directory / "token"),
                "transfer_deadline_s": DEADLINE_S,
            },
        }
        super().__init__(
            directory / f"{role}.log",
            *("-m", "vllm.entrypoints.openai.api_server", "--model", str(directory / "model")),
            *("--host", "127.0.0.1", "--port", self.url.rpartition(":")[2]),
            *("--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "4096", "--no-enable-prefix-caching"),
            *("--kv-transfer-config", json.dumps(transfer)),
        )

    def wait(self) -> None:
        """Until it answers."""
        import httpx

        def well() -> bool:
            assert self.alive, self.log.read_text()[-4000:]
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
            return False

        until(well, limit_s=START_LIMIT_S)

    def counted(self, name: str) -> float:
        """The counter of that dotted name, on its ``/metrics``."""
        import httpx
        from prometheus_client.parser import text_string_to_metric_families

        from lmcache_core.series import series_of

        series, labels = series_of(name)
        wanted = dict(zip(series.labels, labels))
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"{series.name}_total" and wanted.items() <= sample.labels.items()
        )


class Proxy(Process):
    """``lmc pd-proxy``."""

    def __init__(self, directory: Path, prefiller: Server, decoder: Server) -> None:
        super().__init__(
            directory / "proxy.log",
            *("-m", "lmcache_core.cli", "pd-proxy", "--port", "0", "--json"),
            *("--prefill", prefiller.url, "--decode", f"{decoder.url}@{decoder.channel}"),
        )

    def wait(self) -> str:
        """Where it listens, once it does."""

        def lines() -> list[str]:
            assert self.alive, self.log.read_text()
            whole = self.log.read_text().rpartition("\n")[0].splitlines()
            return [line for line in whole if '"event": "ready"' in line]

        until(lines)
        return str(json.loads(lines()[0])["address"])


@pytest.fixture
def alive() -> Iterator[list[Process]]:
    processes: list[Process] = []
    yield processes
    for process in processes:
        process.kill()


def streamed(url: str, ids: list[int]) -> str:
    """The text of a completion, piece by piece."""
    import httpx

    body = {
        "model": "tiny", "prompt": ids, "max_tokens": ANSWER_TOKENS, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    pieces: list[str] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        event: dict[str, Any] = json.loads(line)
        pieces += [choice["text"] for choice in event["choices"]]
    assert len(pieces) > 1, "it came in pieces"
    return "".join(pieces)


def references(directory: Path) -> list[str]:
    """What an engine without a connector answers."""
    options = {"skip_tokenizer_init": False}
    alone = Engine(directory / "alone.log", directory / "model", options=options)
    try:
        return [alone.run(ids, tokens=ANSWER_TOKENS)["text"] for ids in PROMPTS]
    finally:
        alone.kill()
        alone.close()


@pytest.mark.slow
def test_a_completion_through_the_proxy(tmp_path: Path, alive: list[Process]) -> None:
    from lmcache_core.demo.models import make_tiny

    make_tiny(tmp_path / "model")
    (tmp_path / "token").touch(0o600)
    (tmp_path / "token").write_text(os.urandom(32).hex())
    prefiller = Server(tmp_path, "kv_producer", free_port())
    alive.append(prefiller)
    decoder = Server(tmp_path, "kv_consumer", free_port())
    alive.append(decoder)
    expected = references(tmp_path)
    for server in (prefiller, decoder):
        server.wait()
    proxy = Proxy(tmp_path, prefiller, decoder)
    alive.append(proxy)
    url = proxy.wait()

    # Counters come out with a later step than the one that they count.
    for _ in range(2):
        assert streamed(url, PROMPTS[0]) == expected[0]
    until(lambda: decoder.counted("receive.bytes") == moved(PROMPTS[0]))
    until(lambda: prefiller.counted("push.bytes") == moved(PROMPTS[0]))

    prefiller.kill()
    assert streamed(url, PROMPTS[1]) == expected[1]
    assert proxy.terminate() == 0
