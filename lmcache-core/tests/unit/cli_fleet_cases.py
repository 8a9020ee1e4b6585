"""Every fleet command of ``lmc``: a command line, what it sends, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from cli_fleet_rig import KEY, job

from lmcache_core.agent.wire import tenant_id
from lmcache_core.controller import messages
from lmcache_core.controller.messages import (
    HealthReply,
    Holding,
    Instance,
    Instances,
    Jobs,
    LookupReply,
    Miss,
    Misses,
    Pin,
    Pins,
    Prefix,
    Prefixes,
    Quota,
    Quotas,
    Rates,
    Tier,
    TierHolding,
    Usage,
    UsageReply,
)

HEALTH = HealthReply(
    status="ok", version="0.9.0", uptime_s=5.0, state="sqlite", instances=2, chunks=70, problems=[]
)
HOST = Tier(
    name="host",
    url="",
    used_bytes=3 << 30,
    capacity_bytes=8 << 30,
    pinned_bytes=1 << 30,
    chunks=60,
    available=True,
    reason="",
    writable=True,
)
REMOTE = msgspec.structs.replace(
    HOST, name="remote", url="redis://r:6379", capacity_bytes=0, available=False, reason="timed out"
)
E0 = Instance(
    name="e0",
    kind="embedded",
    state="live",
    incarnation="i1",
    version="0.9.0",
    pid=7,
    backends={"lmcache-backend-redis": "0.9.0"},
    uptime_s=60.0,
    seen_s=1.0,
    models=["llama"],
    channel="tcp://e0:7000",
    node="",
    workers=[],
    tiers=[HOST, REMOTE],
    errors={"corrupt": 2},
    rates=Rates(requested_tokens=200.0, hit_tokens=150.0),
)
FOUND = LookupReply(
    model="llama",
    chunk_size=256,
    prompt_tokens=1100,
    chunks=4,
    keys=[KEY] * 4,
    instances=[
        Holding(
            instance="e0",
            chunks=3,
            tokens=768,
            tiers=[TierHolding(tier="host", chunks=3, tokens=768)],
        )
    ],
)
PIN = Pin(
    id="p1",
    owner="ci",
    instances=["e0"],
    tier="host",
    model="llama",
    chunks=4,
    made_s=1.0,
    until_s=2e9,
    job="j1",
)
ACME = tenant_id("acme")
USED = UsageReply(
    usage=[
        Usage(
            instance="e0",
            tier="host",
            model="llama",
            tenant_id=ACME,
            lora="",
            tag="aa",
            chunks=40,
            bytes=4 << 20,
        ),
        Usage(
            instance="e1",
            tier="disk",
            model="qwen",
            tenant_id="",
            lora="",
            tag="bb",
            chunks=20,
            bytes=2 << 20,
        ),
    ]
)
LIMIT = Quota(id="q1", tenant_id=ACME, tier="host", bytes=20 << 30)
MISSED = Misses(
    request_id="r/1",
    instance="e0",
    misses=[
        Miss(index=0, key=KEY, reason="", detail="", at_s=None),
        Miss(index=1, key=KEY, reason="evicted", detail="host, lru", at_s=1.7e9),
    ],
)
TOP = Prefixes(
    prefixes=[
        Prefix(
            instance="e0",
            model="llama",
            tenant_id="",
            key=KEY,
            chunks=9,
            saved_tokens=5000,
            requests=12,
        )
    ]
)
IDS = ["--tokens", "-"]
SELECTED = {"tokens": [1, 2, 3]}
ENDED = {"GET /v1/jobs/j1": job()}


@dataclass(frozen=True)
class Case:
    """A command line, what it sends, and what comes back."""

    line: list[str]
    asks: str
    answer: Any
    shows: list[str]
    sends: Any = None
    body_type: Any = None
    status: int = 200
    also: tuple[tuple[str, Any], ...] = ()


def acts(line: list[str], asks: str, sends: dict[str, Any], body_type: Any, kind: str) -> Case:
    done = job(kind=kind)
    shows = [f"job j1: {kind} done, 4 chunks, 2.0 KiB, 2.5 s"]
    return Case(line, asks, done, shows, sends, body_type, 202)


CASES = {
    "status": Case(
        ["status"],
        "GET /v1/health",
        HEALTH,
        ["ok: 2 instances, 70 chunks", "e0", "3.0 GiB", "no: timed out"],
        also=(("GET /v1/instances", Instances(instances=[E0])),),
    ),
    "instances": Case(
        ["instances"], "GET /v1/instances", Instances(instances=[E0]), ["e0", "llama", "75%"]
    ),
    "instance": Case(
        ["instances", "e0"],
        "GET /v1/instances/e0",
        E0,
        ["2 corrupt", "redis://r:6379", "tcp://e0:7000"],
    ),
    "lookup": Case(
        ["lookup", *IDS, "--model", "llama"],
        "POST /v1/lookup",
        FOUND,
        ["4 chunks of 256 tokens", "768", "host 3"],
        {"select": SELECTED | {"model": "llama"}},
        messages.LookupRequest,
    ),
    "usage": Case(["usage"], "GET /v1/usage", USED, ["llama", ACME, "4.0 MiB", "qwen"]),
    "misses": Case(
        ["misses", "r/1"], "GET /v1/misses/r%2F1", MISSED, ["evicted", "host, lru", "hit"]
    ),
    "prefixes": Case(["prefixes"], "GET /v1/prefixes", TOP, ["5,000", "llama", KEY[:16]]),
    "pins": Case(["pins"], "GET /v1/pins", Pins(pins=[PIN]), ["p1", "ci", "e0"]),
    "pin": Case(
        ["pin", *IDS, "--owner", "ci", "--ttl-s", "60", "--instance", "e0"],
        "POST /v1/pins",
        PIN,
        ["pin p1: 4 chunks in host of e0"],
        {"select": SELECTED, "owner": "ci", "ttl_s": 60.0, "instances": ["e0"]},
        messages.PinRequest,
        201,
        also=(("GET /v1/jobs/j1", job(kind="pin")),),
    ),
    "unpin": Case(
        ["unpin", "p1"], "DELETE /v1/pins/p1", job(kind="unpin"), ["unpin done"], status=202
    ),
    "clear": acts(
        ["clear", *IDS, "--tier", "host", "--instance", "e0", "--yes"],
        "POST /v1/clear",
        {"select": SELECTED, "instances": ["e0"], "tiers": ["host"]},
        messages.ClearRequest,
        "clear",
    ),
    "move": acts(
        ["move", "e0/host", "e1/disk", *IDS],
        "POST /v1/move",
        {
            "select": SELECTED,
            "source": {"instance": "e0", "tier": "host"},
            "target": {"instance": "e1", "tier": "disk"},
        },
        messages.MoveRequest,
        "move",
    ),
    "copy": acts(
        ["copy", "e0/host", "e1/disk", "--all"],
        "POST /v1/copy",
        {
            "select": {"all": True},
            "source": {"instance": "e0", "tier": "host"},
            "target": {"instance": "e1", "tier": "disk"},
        },
        messages.MoveRequest,
        "copy",
    ),
    "compress": acts(
        ["compress", "disk", "--codec", "zstd", "--level", "9", "--model", "llama"],
        "POST /v1/compress",
        {"select": {"model": "llama"}, "tier": "disk", "codec": "zstd", "level": "9"},
        messages.RecodeRequest,
        "compress",
    ),
    "decompress": acts(
        ["decompress", "disk", "--model", "llama", "--instance", "e1"],
        "POST /v1/decompress",
        {"select": {"model": "llama"}, "tier": "disk", "instances": ["e1"]},
        messages.RecodeRequest,
        "decompress",
    ),
    "jobs": Case(["jobs"], "GET /v1/jobs", Jobs(jobs=[job()]), ["j1", "clear", "4 of 4", "2.5 s"]),
    "job": Case(["jobs", "j1"], "GET /v1/jobs/j1", job(), ["job j1: clear done", "e0"]),
    "cancel": Case(
        ["jobs", "j1", "--cancel"],
        "POST /v1/jobs/j1/cancel",
        job("cancelled"),
        ["job j1: clear cancelled"],
        status=202,
    ),
    "quotas": Case(["quota"], "GET /v1/quotas", Quotas(quotas=[LIMIT]), ["q1", ACME, "20.0 GiB"]),
    "quota": Case(
        ["quota", "--bytes", "20GiB", "--tenant", "acme", "--tier", "host"],
        "PUT /v1/quotas",
        LIMIT,
        ["quota q1 set"],
        {"bytes": 20 << 30, "tenant_id": ACME, "tier": "host"},
        messages.QuotaRequest,
    ),
}
LINES = [*[case.line for case in CASES.values()], ["quota", "--remove", "q1"]]
