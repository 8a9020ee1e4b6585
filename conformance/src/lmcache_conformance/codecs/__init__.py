"""The family of checks for codecs: `CodecConformance` for pytest, ``lmcache-conformance codec``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcache_conformance.codecs.checks import CODEC_CHECKS
from lmcache_conformance.codecs.judge import CodecCertificate, judge_codec

if TYPE_CHECKING:
    from lmcache_conformance.codecs.suite import CodecConformance

__all__ = ["CODEC_CHECKS", "CodecCertificate", "CodecConformance", "judge_codec"]


def __getattr__(name: str) -> Any:
    """The suite needs pytest, which judging does not."""
    if name == "CodecConformance":
        from lmcache_conformance.codecs.suite import CodecConformance

        return CodecConformance
    raise AttributeError(name)
