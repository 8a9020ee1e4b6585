"""Conformance suite for backends, channels and codecs of lmcache-core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcache_conformance.frame import Inconclusive, NotClaimed, Outcome, Profile, Wrong
from lmcache_conformance.harness import Harness, TcpHarness, small_disk, unmount
from lmcache_conformance.memory import Memory, value
from lmcache_conformance.proxy import FaultProxy, Faults
from lmcache_conformance.rig import within

if TYPE_CHECKING:
    from lmcache_conformance.channels.suite import ChannelConformance
    from lmcache_conformance.codecs.suite import CodecConformance
    from lmcache_conformance.suite import ConnectorConformance

__all__ = [
    "ChannelConformance",
    "CodecConformance",
    "ConnectorConformance",
    "FaultProxy",
    "Faults",
    "Harness",
    "Inconclusive",
    "Memory",
    "NotClaimed",
    "Outcome",
    "Profile",
    "TcpHarness",
    "Wrong",
    "small_disk",
    "unmount",
    "value",
    "within",
]


def __getattr__(name: str) -> Any:
    """The suite needs pytest and hypothesis, which a child process of a check does not."""
    if name == "ConnectorConformance":
        from lmcache_conformance.suite import ConnectorConformance

        return ConnectorConformance
    if name == "ChannelConformance":
        from lmcache_conformance.channels.suite import ChannelConformance

        return ChannelConformance
    if name == "CodecConformance":
        from lmcache_conformance.codecs.suite import CodecConformance

        return CodecConformance
    raise AttributeError(name)
