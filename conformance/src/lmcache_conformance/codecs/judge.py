"""One run of the codec family, and its certificate."""

from __future__ import annotations

import platform
import random
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from lmcache_conformance.certificate import suite_version
from lmcache_conformance.codecs.checks import CODEC_CHECKS
from lmcache_conformance.codecs.rig import CodecRig
from lmcache_conformance.frame import Check, Outcome, Result, run_check
from lmcache_core.sdk import CODEC_API_VERSION, Codec

SCHEMA = "lmcache-codec-conformance/1"


class CodecCertificate(msgspec.Struct, frozen=True, kw_only=True):
    """See `SCHEMA`; ``verdict`` is PASS when no check failed."""

    schema: str
    codec: str
    codec_version: int
    lossless: bool
    max_error: dict[str, float]
    contract: str
    suite: str
    core: str
    machine: str
    verdict: str
    checks: list[dict[str, str | float | dict[str, float]]]


def judge_codec(
    codec: Codec,
    *,
    seed: int | None = None,
    checks: Sequence[Check] = CODEC_CHECKS,
    told: Callable[[Check, Result], None] = lambda check, result: None,
) -> CodecCertificate:
    """Run ``checks`` on a prepared codec.

    Args:
        seed: of everything random; None draws one.
        told: gets each answer as it comes.
    """
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    results = []
    for each in checks:
        result = run_check(each, CodecRig(codec, seed=seed))
        results.append(result)
        told(each, result)
    failed = any(result.outcome is Outcome.FAIL for result in results)
    return CodecCertificate(
        schema=SCHEMA,
        codec=codec.info.name,
        codec_version=codec.info.version,
        lossless=codec.info.lossless,
        max_error=dict(codec.info.max_error),
        contract=".".join(map(str, CODEC_API_VERSION)),
        suite=suite_version(),
        core=metadata.version("lmcache-core"),
        machine=f"{platform.platform()} {platform.machine()}",
        verdict=(Outcome.FAIL if failed else Outcome.PASS).value,
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


def write(found: CodecCertificate, folder: Path) -> Path:
    """``codec-NAME.json`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"codec-{found.codec}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    return path
