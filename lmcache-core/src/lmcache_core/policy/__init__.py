"""Eviction policies: pure bookkeeping, no I/O, no clock."""

from lmcache_core.policy.lru import Lru

__all__ = ["Lru"]
