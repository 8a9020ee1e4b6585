"""``lmc clear`` says what would go, and asks."""

from __future__ import annotations

import msgspec
import pytest
from cli_fleet_rig import (
    FakeController,
    controller,
    job,
    lmc,
    on_terminal,
    says,
)

from lmcache_core.agent.wire import tenant_id
from lmcache_core.controller.messages import (
    ClearRequest,
    Holding,
    LookupReply,
    TierHolding,
    Usage,
    UsageReply,
)

__all__ = ["controller"]
ACME = tenant_id("acme")
USED = UsageReply(
    usage=[
        Usage(
            instance="e0",
            tier="host",
            model="llama",
            tenant_id=ACME,
            lora="",
            tag="a",
            chunks=40,
            bytes=4 << 20,
        ),
        Usage(
            instance="e0",
            tier="disk",
            model="llama",
            tenant_id=ACME,
            lora="",
            tag="a",
            chunks=50,
            bytes=5 << 20,
        ),
        Usage(
            instance="e1",
            tier="host",
            model="qwen",
            tenant_id="",
            lora="",
            tag="b",
            chunks=20,
            bytes=2 << 20,
        ),
    ]
)
FOUND = LookupReply(
    model="llama",
    chunk_size=256,
    prompt_tokens=0,
    chunks=4,
    keys=[],
    instances=[
        Holding(
            instance="e0",
            chunks=3,
            tokens=768,
            tiers=[TierHolding(tier="host", chunks=3, tokens=768)],
        ),
        Holding(
            instance="e1",
            chunks=1,
            tokens=256,
            tiers=[TierHolding(tier="disk", chunks=1, tokens=256)],
        ),
    ],
)


@pytest.mark.parametrize(
    ("line", "said", "unsaid"),
    [
        (
            ["--model", "llama"],
            ["of model llama, in every tier of every instance: 90 chunks, 9.0 MiB", "e0/disk"],
            "e1",
        ),
        (
            ["--model", f"llama@{'0' * 16}"],
            ["of model llama@0000000000000000, in every tier of every instance: at most 90 chunks"],
            "e1",
        ),
        (
            ["--all", "--tier", "host"],
            ["everything, in host of every instance: 60 chunks, 6.0 MiB"],
            "e0/disk",
        ),
        (
            ["--tenant", "acme"],
            [f"of tenant {ACME}, in every tier of every instance: 90 chunks"],
            "e1",
        ),
        (["--tenant", ""], ["of requests without a tenant", "20 chunks", "e1/host: qwen"], "e0"),
        (
            ["--text", "hello", "--instance", "e0"],
            ["4 chunks of llama, in every tier of e0", "e0 has the first 3: host 3"],
            "e1 has",
        ),
    ],
    ids=["model", "model by tag", "all", "tenant", "no tenant", "prefix"],
)
def test_clear_says_what_would_go_and_does_nothing_when_told_no(
    controller: FakeController, line: list[str], said: list[str], unsaid: str
) -> None:
    controller.on("GET", "/v1/usage", USED)
    controller.on("POST", "/v1/lookup", FOUND)
    code, shown = on_terminal("clear", *line, types=b"n\n")
    assert code == 1 and "nothing was cleared" in shown
    assert not [text for text in said if text not in shown], shown
    assert unsaid not in shown
    assert not controller.asked_for("POST", "/v1/clear")


def test_clear_goes_on_when_told_yes_with_a_bar(controller: FakeController) -> None:
    controller.on("GET", "/v1/usage", msgspec.structs.replace(USED, truncated=True))
    controller.on("POST", "/v1/clear", says(job("running", total=9, settled=0), 202))
    controller.on("GET", "/v1/jobs/j1", job("running", total=9, settled=5), job(total=9, settled=9))
    code, shown = on_terminal("clear", "--model", "llama", types=b"y\n")
    assert code == 0
    assert "at least 90 chunks" in shown and "clear, 1 of 1 part done" in shown
    assert "job j1: clear done, 9 chunks" in shown
    [asked] = controller.asked_for("POST", "/v1/clear")
    assert msgspec.json.decode(asked.body, type=ClearRequest).select.model == "llama"


def test_clear_without_a_terminal_asks_for_yes(controller: FakeController) -> None:
    result = lmc("clear", "--all")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: clear asks first, and this is no terminal\nhint: give --yes\n"
    assert not controller.asked
