"""Conformance suite for backends of lmcache-core."""

from lmcache_conformance.harness import Harness
from lmcache_conformance.suite import ConnectorConformance

__all__ = ["ConnectorConformance", "Harness"]
