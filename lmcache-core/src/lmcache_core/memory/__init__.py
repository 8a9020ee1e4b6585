"""The host tier's memory: one arena shared by processes, and the allocator of its slots."""

from lmcache_core.memory.allocator import Allocator, AllocatorError
from lmcache_core.memory.arena import Arena, ArenaError, ArenaRef

__all__ = ["Allocator", "AllocatorError", "Arena", "ArenaError", "ArenaRef"]
