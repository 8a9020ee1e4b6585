"""A small fleet, its jobs, usage and history, for the stub to tell."""

from __future__ import annotations

import hashlib
import math
import time
from typing import Any

from lmcache_core.controller import messages as api

GIB = 1 << 30
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
OTHER_MODEL = "Qwen/Qwen2.5-14B-Instruct"
TENANTS = ("", "3f2a9c01d4e5b678", "9b71d0aa42c3fe15")


def chunk_key(number: int) -> str:
    """A stored key in hex."""
    return hashlib.sha512(str(number).encode()).hexdigest()[:92]


def tier(name: str, used: float, capacity: float, pinned: float = 0, **more: Any) -> api.Tier:
    """One tier; sizes in GiB."""
    url = {"host": "", "disk": "file:///nvme/kv", "remote": "redis://cache:6379"}.get(name, "")
    return api.Tier(
        name=name, url=url, used_bytes=int(used * GIB), capacity_bytes=int(capacity * GIB),
        pinned_bytes=int(pinned * GIB), chunks=int(used * 31), available=more.get("ok", True),
        reason=more.get("reason", ""), writable=more.get("writable", True),
    )  # fmt: skip


def instance(name: str, number: int = 0, **more: Any) -> api.Instance:
    """An instance with three tiers and some traffic."""
    asked = 21_000.0 + 4_700 * math.sin(number * 1.7)
    rates = api.Rates(
        requested_tokens=asked, hit_tokens=asked * (0.55 + 0.06 * (number % 6)),
        stored_tokens=asked * 0.31, read_bytes=3.1e8 + 4e7 * (number % 5),
        write_bytes=1.2e8 + 2e7 * (number % 4),
    )  # fmt: skip
    fields: dict[str, Any] = {
        "kind": "embedded", "state": "live", "incarnation": f"{name}-1a2b",
        "version": "0.9.0", "backends": {"lmcache-backend-redis": "0.9.0"}, "pid": 4000 + number,
        "uptime_s": 86_400.0 * 3 + 977 * number, "seen_s": time.time() - 0.4, "models": [MODEL],
        "channel": f"tcp://10.0.0.{number + 10}:7001", "node": "", "workers": [], "rates": rates,
        "tiers": [
            tier("host", 19.7 + 0.05 * number, 20, 2.2 + 0.7 * (number % 3)),
            tier("disk", 118 + 11 * (number % 7), 200, 8),
            tier("remote", 840, 0),
        ],
    }  # fmt: skip
    return api.Instance(name=name, **{**fields, **more})


def fleet() -> list[api.Instance]:
    """A small fleet with one of everything that can be seen."""
    broken = [tier("host", 20, 20, 1), tier("disk", 61, 200),
              tier("remote", 840, 0, ok=False, reason="3 timeouts in 10 s")]  # fmt: skip
    read_only = [tier("host", 61.2, 64, 11.5), tier("disk", 900, 2000), tier("remote", 840, 0,
                 writable=False)]  # fmt: skip
    engine = {"kind": "engine", "tiers": [], "node": "node-a", "models": [OTHER_MODEL]}
    return [
        instance("llama-0", 0), instance("llama-1", 1),
        instance("llama-2", 2, tiers=broken,
                 errors={"remote.get.timeout": 41, "remote.corrupt": 1}),
        instance("llama-3", 3, state="lost", rates=api.Rates(), seen_s=time.time() - 412),
        instance("node-a", 4, kind="node", tiers=read_only, workers=["qwen-0", "qwen-1"],
                 models=[OTHER_MODEL], errors={"node.refused_client": 3}),
        instance("qwen-0", 5, **engine), instance("qwen-1", 6, state="resyncing", **engine),
    ]  # fmt: skip


def job(number: int, kind: str, state: str, **more: Any) -> api.Job:
    """A job with one part."""
    total = more.pop("total", 640)
    settled = more.pop("settled", total if state == "done" else total // 3)
    where = more.pop("instance", "llama-1")
    age_s = more.pop("age_s", 40.0 + 211 * number)
    made_s = time.time() - age_s
    part = api.Part(number=0, instance=where, op=kind, state=state, total=total, settled=settled,
                    bytes=settled << 23, errors=more.get("errors", {}))  # fmt: skip
    ended = None if state == "running" else made_s + 3.5 + number % 9
    name = hashlib.sha256(f"job {number}".encode()).hexdigest()[:24]
    return api.Job(id=name, kind=kind, state=state, made_s=made_s, ended_s=ended, total=total,
                   settled=settled, bytes=settled << 23, parts=[part], **more)  # fmt: skip


def jobs() -> list[api.Job]:
    """Some of every state."""
    return [
        job(1, "copy", "running", settled=411), job(2, "compress", "running", total=5200),
        job(3, "clear", "done", total=1204),
        job(4, "move", "failed", errors={"no_room": 12}, error="llama-3 was lost"),
        job(5, "pin", "done", total=96, pin="pin-1"), job(6, "copy", "cancelled"),
    ]  # fmt: skip


def history(points: int = 360, interval_s: float = 10.0) -> api.History:
    """The last hour: a quiet start, a wave, and an interval without requests."""
    now_s, samples = time.time(), []
    for at in range(points):
        wave = math.sin(at / 41) + 0.35 * math.sin(at / 7) + 0.12 * math.sin(at * 2.1)
        asked = 90_000 + 31_000 * wave
        rate = 0.58 + 0.16 * math.sin(at / 60) + 0.03 * math.sin(at / 3)
        quiet = 120 <= at < 126
        samples.append(api.Sample(
            at_s=now_s - (points - 1 - at) * interval_s, hit_rate=None if quiet else rate,
            requested_tokens=0 if quiet else asked, hit_tokens=0 if quiet else asked * rate,
            stored_tokens=0 if quiet else asked * 0.3,
            read_bytes=0 if quiet else 1.1e9 + 3e8 * wave, write_bytes=0 if quiet else 5e8,
        ))  # fmt: skip
    return api.History(interval_s=interval_s, samples=samples)


def usage(names: list[str]) -> list[api.Usage]:
    """What each tenant takes, by model, of host and disk."""
    rows = []
    for at, name in enumerate(names):
        model = OTHER_MODEL if name.startswith(("node", "qwen")) else MODEL
        for number, tenant in enumerate(TENANTS):
            for where, size in (("host", 4.5), ("disk", 33.0)):
                nbytes = int(size * GIB * (1 - 0.27 * number) * (1 + 0.02 * at))
                rows.append(api.Usage(
                    instance=name, tier=where, model=model, tenant_id=tenant, lora="",
                    tag="00" * 8, chunks=nbytes >> 23, bytes=nbytes,
                ))  # fmt: skip
    return rows
