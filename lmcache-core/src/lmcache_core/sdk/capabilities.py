"""What a backend claims about itself.  Each claim is held to by the conformance suite."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from lmcache_core.sdk.buffers import MemoryKind


class Durability(enum.Enum):
    """What an acknowledged put survives."""

    NONE = "none"
    """Nothing is promised."""
    PROCESS = "process"
    """The end of this process, also by SIGKILL."""
    SERVER = "server"
    """A restart of the store's server."""
    HOST = "host"
    """A crash of the host or loss of power."""


class Sharing(enum.Enum):
    """Who else sees an acknowledged put."""

    PROCESS = "process"
    """Only this connector, and others of its process."""
    HOST = "host"
    """Every process of the host."""
    CLUSTER = "cluster"
    """Every host that opens the same store."""


class OnExisting(enum.Enum):
    """What a put of a present key leaves behind.  It answers OK either way."""

    KEEP = "keep"
    """The old value."""
    REPLACE = "replace"
    """The new value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """Constant after open.  The default of a field means "not claimed".

    Attributes:
        max_concurrency: calls that may run at the same time; core never exceeds it.
        max_batch: keys in one call.
        max_value_bytes: size of one value.
        alignment: buffers' address and nbytes are multiples of this.
        memory: kinds of memory that buffers may live in.
        on_existing: what a put of a present key leaves.
        zero_copy: moves bytes without a host copy of its own.
        regions, leases, scan, submit: the optional protocol of that name is implemented.
        checksums: a stored value that was changed behind the connector's back (a flipped bit, a
            lost tail) is CORRUPT or MISS; core's envelope finds it either way.
        evicts: the store may drop an acknowledged value by itself.
        capacity_reported: `Health` carries used and total bytes.
        durability, sharing: see the enums.
    """

    max_concurrency: int = 1
    max_batch: int = 64
    max_value_bytes: int = 1 << 30
    alignment: int = 1
    memory: frozenset[MemoryKind] = field(default_factory=lambda: frozenset({MemoryKind.HOST}))
    on_existing: OnExisting = OnExisting.REPLACE
    zero_copy: bool = False
    regions: bool = False
    leases: bool = False
    scan: bool = False
    submit: bool = False
    checksums: bool = False
    evicts: bool = False
    capacity_reported: bool = False
    durability: Durability = Durability.NONE
    sharing: Sharing = Sharing.PROCESS
