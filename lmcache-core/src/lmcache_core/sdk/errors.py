"""Exceptions of the contract: failures of a whole call, never of one key.

Each carries the backend's name, the operation, whether a later try can succeed, and a
hint that names the fix.
"""

from __future__ import annotations


class LMCacheError(Exception):
    """Base of everything that the project raises on purpose.

    Args:
        message: what went wrong, without secrets.
        backend: short name of the backend, "" when none is involved.
        op: the operation, such as ``"get_into"`` or ``"open"``.
        hint: what the reader should do about it.
    """

    retryable = False

    def __init__(self, message: str, *, backend: str = "", op: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.backend = backend
        self.op = op
        self.hint = hint

    def __str__(self) -> str:
        where = "/".join(part for part in (self.backend, self.op) if part)
        text = f"[{where}] {self.message}" if where else self.message
        return f"{text} (hint: {self.hint})" if self.hint else text


class ConfigError(LMCacheError):
    """A setting, URL or option is wrong.  Raised at start, before anything is served."""


class BackendUnavailable(LMCacheError):
    """The store can't be reached, or has too many stuck calls.  A later try may succeed."""

    retryable = True


class BackendClosed(LMCacheError):
    """The connector was closed, or is used in a forked child."""


class Unsupported(LMCacheError):
    """The operation is not offered by this backend."""


class ContractViolation(LMCacheError):
    """One side broke the contract: over ``max_batch``, overlapping targets, an answer of
    the wrong length.  Nothing was touched."""
