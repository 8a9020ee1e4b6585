"""Mooncake Store behind `lmcache_core.sdk`: ``mooncake://``."""
