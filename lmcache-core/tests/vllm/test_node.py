"""Engines on a node server: shared live, by tensor ranks too, and outlived by the cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from conftest import Engine, cached, random_tokens
from test_processes import HERE, run_child

from lmcache_core.cli.serve import node_status

PROMPT = random_tokens(71, 700)
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


class Node:
    """``lmc serve`` in a process of its own, over a directory that outlives it."""

    def __init__(self, directory: Path) -> None:
        self.socket = str(directory / "node.sock")
        self._config = directory / "node.json"
        tiers = [{"host": "128MiB"}, {"url": f"file://{directory}/kv", "size": "512MiB"}]
        self._config.write_text(json.dumps({"tiers": tiers, "prefault": False}))
        self.start()

    @property
    def extra(self) -> dict[str, Any]:
        return {"chunk_size": 256, "node": self.socket, "node_retry_s": 0.1}

    def start(self) -> None:
        command = [sys.executable, "-m", "lmcache_core.cli", "serve", "--json"]
        command += ["--config", str(self._config), "--socket", self.socket]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert json.loads(self.process.stdout.readline())["event"] == "ready"

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.wait(30)

    def holds_nothing_within(self, limit_s: float) -> bool:
        """Whether no session is left."""
        end_s = time.monotonic() + limit_s
        while node_status(self.socket, "")["sessions"]:
            if time.monotonic() > end_s:
                return False
            time.sleep(0.05)
        return True


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    if made.process.returncode is None:
        made.end(signal.SIGKILL)


def test_two_engines_share_chunks_live_and_models_never_meet(
    llama: Path, start: Any, node: Node, tmp_path: Path
) -> None:
    other = tiny_models.llama(tmp_path / "other", seed=5)
    plain: Engine = start(llama)
    reference = plain.tokens([PROMPT])
    engine: Engine = start(llama, node.extra)
    (output,) = engine.run([PROMPT])
    assert ([list(output.outputs[0].token_ids)], output.num_cached_tokens) == (reference, 0)
    engine.settle()
    (second,) = run_child(tmp_path, 0, str(llama), node.extra, PROMPT, 1)
    assert second == [reference[0], 512, {"host": 512}], "while the first engine is alive"
    (stranger,) = run_child(tmp_path, 0, str(other), node.extra, PROMPT, 1)
    assert stranger[1:] == [0, {}]
    assert cached(engine.run([PROMPT])[0]) == {"host": 512}
    engine.close()
    assert node.holds_nothing_within(10)


def test_a_server_that_dies_is_missed_for_a_moment(llama: Path, start: Any, node: Node) -> None:
    plain: Engine = start(llama)
    reference = plain.tokens([PROMPT])
    engine: Engine = start(llama, node.extra)
    assert engine.tokens([PROMPT]) == reference
    engine.settle()
    end_s = time.monotonic() + 10
    while node_status(node.socket, "")["counters"].get("disk.stored", 0) < 2:
        assert time.monotonic() < end_s
        time.sleep(0.02)
    node.end(signal.SIGKILL)
    (output,) = engine.run([PROMPT])
    assert ([list(output.outputs[0].token_ids)], output.num_cached_tokens) == (reference, 0)
    node.start()
    while not engine.connector.scheduler.cache.connected:
        assert time.monotonic() < end_s + 20
        engine.connector.scheduler.cache.poll()
        time.sleep(0.02)
    (output,) = engine.run([PROMPT])
    assert list(output.outputs[0].token_ids) == reference[0]
    assert cached(output) == {"disk": 512}, "what the dead server wrote"
    assert node.end() == 0


def run_two_ranks(tmp_path: Path, *args: Any, **env: str) -> list[Any]:
    return run_child(tmp_path, 1, *args, {"tensor_parallel_size": 2}, env={**TWO_RANKS, **env})


@pytest.mark.slow
def test_two_tensor_ranks_share_a_slot_and_parallel_sizes_never_meet(
    llama: Path, node: Node, tmp_path: Path
) -> None:
    (reference,) = run_two_ranks(tmp_path, str(llama), None, PROMPT, 1)
    cold, warm = run_two_ranks(tmp_path, str(llama), node.extra, PROMPT, 2)
    assert (cold[0], cold[1]) == (reference[0], 0)
    assert warm == [reference[0], 512, {"host": 512}]
    (single,) = run_child(tmp_path, 0, str(llama), node.extra, PROMPT, 1)
    assert single[1:] == [0, {}], "shards of another number of ranks"
    (again,) = run_two_ranks(tmp_path, str(llama), node.extra, PROMPT, 1)
    assert again == [reference[0], 512, {"host": 512}]
    assert node.holds_nothing_within(10)


@pytest.mark.slow
def test_an_engine_killed_with_its_ranks_leaves_nothing(
    llama: Path, node: Node, tmp_path: Path
) -> None:
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    env = {**os.environ, **TWO_RANKS, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    child = subprocess.Popen(
        [sys.executable, str(script), json.dumps([str(llama), node.extra])],
        env={**env, "PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    while (line := child.stdout.readline()) and line.strip() != "busy":
        pass
    try:
        end_s = time.monotonic() + 60
        while node_status(node.socket, "")["counters"].get("host.stored", 0) < 4:
            assert time.monotonic() < end_s
            time.sleep(0.05)
        assert len(node_status(node.socket, "")["sessions"]) == 1
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait(30)
        child.stdout.close()
    assert node.holds_nothing_within(20)
    assert node.end() == 0, "nothing keeps the server from flushing"


BUSY = """
import json, sys
from conftest import Engine, random_tokens
if __name__ == "__main__":
    model, extra = json.loads(sys.argv[1])
    engine = Engine(model, extra, tensor_parallel_size=2)
    engine.run([random_tokens(0, 600)], 2)
    print("busy", flush=True)
    for turn in range(1000):
        engine.run([random_tokens(turn % 7 + i, 900) for i in range(4)], 4)
"""
