"""What the API shows of instances.  Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from operator import itemgetter

from lmcache_core.agent import wire
from lmcache_core.controller import messages
from lmcache_core.controller.meters import errors_of
from lmcache_core.controller.names import Names
from lmcache_core.controller.registry import Record, Registry
from lmcache_core.controller.selection import Chosen
from lmcache_core.keys import TAG_BYTES

MAX_PROBLEMS = 256
MAX_USAGE = 10_000


def instance(record: Record, registry: Registry, now_s: float) -> messages.Instance:
    """One instance."""
    status = record.status
    node = registry.node_of(record)
    workers = [
        other.name for other in registry.records.values() if registry.node_of(other) is record
    ]
    return messages.Instance(
        name=record.name,
        kind=record.kind,
        state=registry.state(record),
        incarnation=record.incarnation,
        version=status.version if status else "",
        backends=status.backends if status else {},
        pid=status.pid if status else 0,
        uptime_s=status.uptime_s if status else 0.0,
        seen_s=record.seen_wall_s,
        models=sorted({model.name for model in record.models.values()}),
        channel=status.channel if status else "",
        node=node.name if node else "",
        workers=sorted(workers),
        tiers=[
            messages.Tier(
                name=tier.name,
                url=tier.url,
                used_bytes=tier.used_bytes,
                capacity_bytes=tier.capacity_bytes,
                pinned_bytes=tier.pinned_bytes,
                chunks=registry.directory.chunks(record.slot, number),
                available=tier.available,
                reason=tier.reason,
                writable=tier.writable,
            )
            for number, tier in enumerate(record.tiers)
        ],
        rates=record.meter.rates(now_s),
        errors=errors_of(status.counters) if status else {},
    )


def problems(registry: Registry, store_down: str, names_lack: str) -> list[str]:
    """What an operator should look at."""
    found = [f"the state can't be reached: {store_down}"] if store_down else []
    if names_lack:
        found.append(f"instances named {names_lack}: raise --max-namespaces or --max-models")
    for name, record in sorted(registry.records.items()):
        if not registry.is_live(record):
            found.append(f"instance {name} is lost")
            continue
        if record.refused:
            found.append(record.refused)
        for tier in record.tiers:
            if not tier.available:
                why = f": {tier.reason}" if tier.reason else ""
                found.append(f"tier {tier.name} of {name} is not available{why}")
            elif tier.capacity_bytes and tier.pinned_bytes >= tier.capacity_bytes:
                found.append(f"tier {tier.name} of {name} has no room that is not pinned")
    if len(found) > MAX_PROBLEMS:
        found[MAX_PROBLEMS:] = [f"and {len(found) - MAX_PROBLEMS} more"]
    return found


def lookup(chosen: Chosen, registry: Registry) -> messages.LookupReply:
    """Who has how much of a prefix."""
    size = chosen.model.chunk_size if chosen.model is not None else 0
    holdings = []
    for run in registry.directory.prefix(chosen.prefix):
        record = registry.at(run.slot)
        if record is None or not registry.is_live(record):
            continue
        tiers = [
            messages.TierHolding(tier=tier.name, chunks=chunks, tokens=chunks * size)
            for tier, chunks in zip(record.tiers, run.tiers)
            if chunks
        ]
        holdings.append(
            messages.Holding(
                instance=record.name, chunks=run.chunks, tokens=run.chunks * size, tiers=tiers
            )
        )
    return messages.LookupReply(
        model=chosen.model.name if chosen.model is not None else "",
        chunk_size=size,
        prompt_tokens=chosen.prompt_tokens,
        chunks=len(chosen.prefix),
        keys=[key.hex() for key in chosen.prefix],
        instances=holdings,
    )


def usage(registry: Registry, names: Names, *, instance: str, tier: str) -> messages.UsageReply:
    """What namespaces take; "" of ``instance`` and ``tier`` means all."""
    shares: list[tuple[int, str, str, wire.Share]] = []
    truncated = False
    for record in registry.records.values():
        if instance not in ("", record.name):
            continue
        for status in record.tiers:
            if tier not in ("", status.name):
                continue
            truncated |= len(status.shares) >= wire.MAX_NAMESPACES
            shares += ((-s.nbytes, record.name, status.name, s) for s in status.shares)
    rows = []
    for _, name, tier_name, share in heapq.nsmallest(MAX_USAGE, shares, key=itemgetter(0, 1, 2)):
        model, tenant, lora = names.describe(share.tag)
        rows.append(
            messages.Usage(
                instance=name,
                tier=tier_name,
                model=model,
                tenant_id=tenant,
                lora=lora,
                tag=share.tag.hex(),
                chunks=share.chunks,
                bytes=share.nbytes,
            )
        )
    return messages.UsageReply(usage=rows, truncated=truncated or len(shares) > MAX_USAGE)


def prefixes(records: Iterable[Record], names: Names, limit: int) -> messages.Prefixes:
    """Those that saved most prefill."""
    top = [
        (row, record)
        for record in records
        for row in (record.status.top if record.status is not None else ())
    ]
    top.sort(key=lambda pair: (-pair[0].saved_tokens, pair[1].name, pair[0].key))
    shown = []
    for row, record in top[:limit]:
        model, tenant, _ = names.describe(row.key[:TAG_BYTES])
        shown.append(
            messages.Prefix(
                instance=record.name,
                model=model,
                tenant_id=tenant,
                key=row.key.hex(),
                chunks=row.chunks,
                saved_tokens=row.saved_tokens,
                requests=row.requests,
            )
        )
    return messages.Prefixes(prefixes=shown)
