"""The family of checks for channels: `ChannelConformance` for pytest, ``lmcache-conformance
channel``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcache_conformance.channels.sides import Source

if TYPE_CHECKING:
    from lmcache_conformance.channels.checks import CHANNEL_CHECKS
    from lmcache_conformance.channels.judge import ChannelCertificate, judge_channel
    from lmcache_conformance.channels.suite import ChannelConformance

__all__ = [
    "CHANNEL_CHECKS", "ChannelCertificate", "ChannelConformance", "Source", "judge_channel",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The process of a peer needs none of the checks, and judging needs no pytest."""
    if name == "CHANNEL_CHECKS":
        from lmcache_conformance.channels.checks import CHANNEL_CHECKS

        return CHANNEL_CHECKS
    if name in ("ChannelCertificate", "judge_channel"):
        from lmcache_conformance.channels import judge

        return getattr(judge, name)
    if name == "ChannelConformance":
        from lmcache_conformance.channels.suite import ChannelConformance

        return ChannelConformance
    raise AttributeError(name)
