"""Conformance suite for backends of lmcache-core."""

from lmcache_conformance.harness import Harness, Memory, value, within
from lmcache_conformance.proxy import FaultProxy, Faults
from lmcache_conformance.suite import ConnectorConformance

__all__ = ["ConnectorConformance", "FaultProxy", "Faults", "Harness", "Memory", "value", "within"]
