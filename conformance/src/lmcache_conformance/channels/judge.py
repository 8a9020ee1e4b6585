"""One run of the channel family, and its certificate."""

from __future__ import annotations

import dataclasses
import platform
import random
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from lmcache_conformance.certificate import suite_version
from lmcache_conformance.channels.checks import CHANNEL_CHECKS
from lmcache_conformance.channels.rig import ChannelRig
from lmcache_conformance.channels.sides import Source
from lmcache_conformance.frame import Check, Outcome, Result, run_check
from lmcache_core.sdk import CHANNEL_API_VERSION, CHANNEL_GROUP, ChannelCapabilities
from lmcache_core.url import redact

SCHEMA = "lmcache-channel-conformance/1"


class ChannelCertificate(msgspec.Struct, frozen=True, kw_only=True):
    """See `SCHEMA`; ``verdict`` is PASS when no check failed or was INCONCLUSIVE."""

    schema: str
    scheme: str
    url: str
    plan: str
    capabilities: dict[str, Any]
    contract: str
    suite: str
    core: str
    distribution: str
    machine: str
    verdict: str
    checks: list[dict[str, str | float | dict[str, float]]]


def judge_channel(
    source: Source,
    *,
    quick: bool = False,
    seed: int | None = None,
    checks: Sequence[Check] | None = None,
    told: Callable[[Check, Result], None] = lambda check, result: None,
) -> ChannelCertificate:
    """Run ``checks``, else all of them, on the channel that ``source`` opens.

    Args:
        quick: the short form of the long checks.
        seed: of everything random; None draws one.
        told: gets each answer as it comes.

    Raises:
        ConfigError: the channel can't be opened.
        BackendUnavailable: its address can't be listened at.
    """
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    first = ChannelRig(source, seed=seed)
    try:
        claims = first.claims()
    finally:
        first.finish()
    results = []
    for each in CHANNEL_CHECKS if checks is None else checks:
        result = run_check(each, ChannelRig(source, seed=seed, quick=quick))
        results.append(result)
        told(each, result)
    outcomes = {result.outcome for result in results}
    verdict = next(
        (each for each in (Outcome.FAIL, Outcome.INCONCLUSIVE) if each in outcomes), Outcome.PASS
    )
    return ChannelCertificate(
        schema=SCHEMA,
        scheme=first.plugin.scheme,
        url=redact(source.url),
        plan="quick" if quick else "full",
        capabilities=_plain(claims),
        contract=".".join(map(str, CHANNEL_API_VERSION)),
        suite=suite_version(),
        core=metadata.version("lmcache-core"),
        distribution=_distribution(first.plugin.scheme),
        machine=f"{platform.platform()} {platform.machine()}",
        verdict=verdict.value,
        checks=[
            {
                "id": result.id,
                "outcome": result.outcome.value,
                "seconds": result.seconds,
                "seed": result.seed,
                "reason": result.reason,
                "figures": result.figures or {},
            }
            for result in results
        ],
    )


def write(found: ChannelCertificate, path: Path) -> Path:
    """Write it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    return path


def _plain(claims: ChannelCapabilities) -> dict[str, Any]:
    found = {each.name: getattr(claims, each.name) for each in dataclasses.fields(claims)}
    return {**found, "memory": sorted(kind.value for kind in claims.memory)}


def _distribution(scheme: str) -> str:
    """Name and version of what serves ``scheme``; "" when it is not installed."""
    for entry in metadata.entry_points(group=CHANNEL_GROUP):
        if entry.name == scheme and entry.dist is not None:
            return f"{entry.dist.name} {entry.dist.version}"
    return ""
