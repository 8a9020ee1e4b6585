"""Per-key answers of a connector.  They are values, never exceptions."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Status(enum.Enum):
    """What happened to one key of one batch.

    A caller treats a value that it does not know as `FAILED`, so members may be added.
    """

    OK = "ok"
    """Done: the whole value was read or written, or the key is there (exists)."""
    MISS = "miss"
    """The key is absent (get, exists)."""
    REJECTED = "rejected"
    """Refused and nothing done: no space, value too large, misaligned, leased by another."""
    SIZE_MISMATCH = "size_mismatch"
    """The target is smaller than the value; `GetResult.nbytes` is the true size where known."""
    CORRUPT = "corrupt"
    """The stored value is not whole (a torn publication, a failed checksum of the store)."""
    TIMED_OUT = "timed_out"
    """Not finished by the deadline.  The buffer is the caller's again."""
    ABANDONED = "abandoned"
    """Not finished, and native code may still touch the buffer: the caller must keep it
    mapped and unused until `HostServices.released(token)`."""
    FAILED = "failed"
    """Anything else that went wrong with this one key."""


class GetResult(NamedTuple):
    """Answer of `RemoteConnector.get_into` for one key.

    ``nbytes`` is the size of the value in bytes: the bytes written when ``status`` is OK,
    the true size (0 if unknown) when it is SIZE_MISMATCH, else 0.
    """

    status: Status
    nbytes: int = 0
