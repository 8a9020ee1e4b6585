"""Data-parallel ranks: engines of one server that get one configuration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from test_node import Node, node
from test_processes import api_server

from lmcache_core.config import EngineConfig
from lmcache_core.integrations.vllm.build import Plan, _say_what_is_open, of_rank
from lmcache_core.logs import logger

__all__ = ["node"]


@pytest.mark.slow
def test_ranks_reuse_what_others_computed(
    tmp_path: Path, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with api_server(tmp_path, node.extra, "--data-parallel-size", "2") as server:
        answers = [server.complete(X_data_parallel_rank=rank) for rank in "011"]
        asked = [
            server.scrape(engine=rank)["lmcache:num_requested_tokens_total", ""] for rank in (0, 1)
        ]
    hits = [answer["kv_transfer_params"]["lmcache"]["cached_tokens"] for answer in answers]
    assert hits == [{}, {"host": 512}, {"host": 512}]
    assert asked[1] == 2 * asked[0] > 0
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1


@pytest.mark.parametrize(
    ("channel", "ours"),
    [
        ("tcp://127.0.0.1:7001", "tcp://127.0.0.1:7004"),
        ("tcp://[::1]:7001?max_peers=9", "tcp://[::1]:7004?max_peers=9"),
        ("tcp://127.0.0.1:7001/", "tcp://127.0.0.1:7004"),
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0"),
        ("tcp://10.0.0.6", "tcp://10.0.0.6"),
        ("", ""),
    ],
)
def test_a_rank_listens_at_a_port_of_its_own(channel: str, ours: str) -> None:
    config = EngineConfig(channel=channel, instance="a")
    assert of_rank(config, 0) == config
    assert (of_rank(config, 3).channel, of_rank(config, 3).instance) == (ours, "a:dp3")
    assert of_rank(EngineConfig(), 3) == EngineConfig()


@pytest.mark.parametrize(("rank", "node", "warned"), [(0, "", 0), (1, "", 1), (1, "/n", 0)])
def test_the_second_rank_says_that_each_holds_a_cache_of_its_own(
    rank: int, node: str, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Plan(EngineConfig(node=node), SimpleNamespace(slot_bytes=1 << 20))  # type: ignore[arg-type]
    with caplog.at_level("INFO", logger=logger.name):
        _say_what_is_open(plan, 1 << 30, rank)
    assert caplog.text.count("`lmc serve`") == warned
