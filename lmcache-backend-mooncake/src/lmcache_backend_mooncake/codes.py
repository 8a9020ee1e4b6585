"""The store's numbers and what they mean here.

They are the values of ``enum class ErrorCode`` in Mooncake 0.3.13 (mooncake-store/include/types.h);
each that is named here was also seen from the library.  Standard library and contract only.
"""

from __future__ import annotations

import enum

from lmcache_core.sdk import Status


class Code(enum.IntEnum):
    """What a native call answers for one key; sizes and 0 are successes."""

    OK = 0
    NO_AVAILABLE_HANDLE = -200
    """No room, or no segment is lent."""
    INVALID_PARAMS = -600
    """A target that is too small; a put of a key that this client is just putting."""
    REPLICA_IS_NOT_READY = -703
    """A put of the key has begun and not ended: nothing can be read, or removed."""
    OBJECT_NOT_FOUND = -704
    OBJECT_ALREADY_EXISTS = -705
    OBJECT_HAS_LEASE = -706
    """It was read within the lease; ``force`` removes it all the same."""
    LEASE_EXPIRED = -707
    """The read took longer than the lease: its bytes may be another's by now."""
    TRANSFER_FAIL = -800
    """The lender of the memory does not answer, such as one that has died."""
    RPC_FAIL = -900
    """The master does not answer."""
    RPC_TIMEOUT = -901


AWAY = frozenset({Code.RPC_FAIL, Code.RPC_TIMEOUT})
"""The whole store is unavailable, not one key."""

_STATUS = {
    Code.NO_AVAILABLE_HANDLE: Status.REJECTED,
    Code.REPLICA_IS_NOT_READY: Status.MISS,
    Code.OBJECT_NOT_FOUND: Status.MISS,
}


def status_of(code: int) -> Status:
    """The answer for a key of a get, put or exists; FAILED for what says nothing about the value.

    A transfer that failed is FAILED and no MISS: the value may have another replica tomorrow.
    """
    if code >= 0:
        return Status.OK
    return _STATUS.get(code, Status.FAILED)  # type: ignore[call-overload, no-any-return]


def deleted(code: int) -> Status:
    """The answer for a key of a delete: an absent one is deleted; one that is being put is not."""
    return Status.OK if code in (Code.OK, Code.OBJECT_NOT_FOUND) else Status.FAILED


def name_of(code: int) -> str:
    """For a message."""
    try:
        return f"{Code(code).name} ({code})"
    except ValueError:
        return f"code {code}"
