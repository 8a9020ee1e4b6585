"""Every check, by family.  An id is never used again for another rule."""

from __future__ import annotations

from lmcache_conformance.checks import (
    api,
    batches,
    capacity,
    concurrency,
    direct,
    faults,
    io_errors,
    keys,
    leaks,
    model,
    ownership,
    performance,
    refusals,
    restart,
    single,
    sizes,
)
from lmcache_conformance.frame import Check

_FAMILIES = (
    api, single, batches, sizes, keys, concurrency, ownership, faults, refusals, io_errors,
    restart, capacity, model, leaks, direct, performance,
)  # fmt: skip

CHECKS: tuple[Check, ...] = tuple(
    each for family in _FAMILIES for each in vars(family).values() if isinstance(each, Check)
)
"""In the order in which they run."""

__all__ = ["CHECKS"]
