"""Memory that core lends to a connector for one call."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NewType

ReleaseToken = NewType("ReleaseToken", int)
"""Names a buffer in `HostServices.released` after its key was answered ABANDONED."""


class MemoryKind(enum.Enum):
    """Where a buffer's bytes live."""

    HOST = "host"
    """Pageable host memory."""
    PINNED = "pinned"
    """Host memory registered with the device driver."""
    DEVICE = "device"
    """An accelerator's memory, without a `Buffer.view`."""


@dataclass(frozen=True, slots=True)
class Region:
    """A large stretch of core's memory that a connector may register once.

    Every `Buffer` with this ``region_id`` lies inside ``[address, address + nbytes)``.
    ``fd`` is the memfd behind it (-1 when there is none), for helpers in other processes.
    """

    region_id: int
    address: int
    nbytes: int
    memory: MemoryKind
    fd: int = -1


@dataclass(frozen=True, slots=True)
class Buffer:
    """One contiguous stretch of core's memory, lent until the call returns.

    Attributes:
        view: the bytes as a flat ``memoryview`` of format ``B`` (read-only for the
            sources of a put), or None for device memory.
        address: address of the first byte.
        nbytes: length in bytes; address and nbytes are multiples of the connector's
            ``capabilities.alignment``.
        memory: where the bytes live.
        region: the registered region that holds it, or None.
        token: names the buffer when it is answered ABANDONED and released later.
    """

    view: memoryview | None
    address: int
    nbytes: int
    memory: MemoryKind = MemoryKind.HOST
    region: Region | None = None
    token: ReleaseToken = ReleaseToken(0)
