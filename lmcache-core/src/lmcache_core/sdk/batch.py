"""Helpers for authors: `BatchLoop` turns per-key functions into a whole connector."""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

from lmcache_core.sdk.base import BaseConnector
from lmcache_core.sdk.buffers import Buffer
from lmcache_core.sdk.connector import OpContext
from lmcache_core.sdk.status import GetResult, Status

T = TypeVar("T")

_REJECTED_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TIMEOUT_ERRNO = {errno.ETIMEDOUT, errno.EAGAIN}


def status_of_oserror(error: OSError) -> Status:
    """The answer for one key whose I/O raised ``error``.

    ENOENT is MISS, no space is REJECTED, a time-out is TIMED_OUT, anything else (EIO,
    EMFILE, EACCES, ...) is FAILED: an unclassified error says nothing about the value.
    """
    if error.errno == errno.ENOENT:
        return Status.MISS
    if error.errno in _REJECTED_ERRNO:
        return Status.REJECTED
    if isinstance(error, TimeoutError) or error.errno in _TIMEOUT_ERRNO:
        return Status.TIMED_OUT
    return Status.FAILED


class BatchLoop(BaseConnector):
    """A connector made of per-key functions.

    A subclass gives ``capabilities``, `exists_one`, `get_one`, `put_one`, `delete_one`
    and `health`.  It gets batching, deadlines between keys, errno mapping, the checks of
    size, alignment and overlap, and BackendClosed after close or fork.

    Each function takes ``timeout_s`` and must hand it to every blocking call; an OSError
    is mapped by `status_of_oserror`.  A ``get_one`` that finds its target too small
    raises `TargetTooSmall`; one that finds the stored value torn raises `ValueCorrupt`.
    """

    @abstractmethod
    def exists_one(self, key: bytes, timeout_s: float) -> bool:
        """Whether ``key`` is present."""

    @abstractmethod
    def get_one(self, key: bytes, target: memoryview, timeout_s: float) -> int | None:
        """Write the value to the start of ``target``; its size, or None when absent."""

    @abstractmethod
    def put_one(self, key: bytes, source: memoryview, timeout_s: float) -> None:
        """Store ``source``, atomically: readers see the old or the new whole value."""

    @abstractmethod
    def delete_one(self, key: bytes, timeout_s: float) -> None:
        """Remove ``key``; absent is fine."""

    def get_buffer(self, key: bytes, target: Buffer, timeout_s: float) -> GetResult:
        """`get_one` on the view of ``target``; a connector that moves bytes without the host's
        memory overrides it."""
        view = self.usable_view(target)
        if view is None:
            return GetResult(Status.REJECTED)
        nbytes = self.get_one(key, view, timeout_s)
        return GetResult(Status.MISS) if nbytes is None else GetResult(Status.OK, nbytes)

    def put_buffer(self, key: bytes, source: Buffer, timeout_s: float) -> Status:
        """`put_one` on the view of ``source``; see `get_buffer`."""
        view = self.usable_view(source)
        if view is None:
            return Status.REJECTED
        self.put_one(key, view, timeout_s)
        return Status.OK

    def exists(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        self.check_call(keys, "exists")

        def one(key: bytes, timeout_s: float) -> Status:
            return Status.OK if self.exists_one(key, timeout_s) else Status.MISS

        return self._each(keys, ctx, one, lambda status: status)

    def get_into(
        self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> list[GetResult]:
        self.check_call(keys, "get_into", targets)
        index = iter(targets)

        def one(key: bytes, timeout_s: float) -> GetResult:
            try:
                return self.get_buffer(key, next(index), timeout_s)
            except TargetTooSmall as small:
                return GetResult(Status.SIZE_MISMATCH, small.nbytes)
            except ValueCorrupt:
                return GetResult(Status.CORRUPT)

        return self._each(keys, ctx, one, GetResult, targets)

    def put_from(
        self, keys: Sequence[bytes], sources: Sequence[Buffer], ctx: OpContext
    ) -> list[Status]:
        self.check_call(keys, "put_from", sources)
        index = iter(sources)

        def one(key: bytes, timeout_s: float) -> Status:
            source = next(index)
            if source.nbytes > self.capabilities.max_value_bytes:
                return Status.REJECTED
            return self.put_buffer(key, source, timeout_s)

        return self._each(keys, ctx, one, lambda status: status, sources)

    def delete(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        self.check_call(keys, "delete")

        def one(key: bytes, timeout_s: float) -> Status:
            try:
                self.delete_one(key, timeout_s)
            except FileNotFoundError:
                pass
            return Status.OK

        return self._each(keys, ctx, one, lambda status: status)

    def _each(
        self,
        keys: Sequence[bytes],
        ctx: OpContext,
        one: Callable[[bytes, float], T],
        wrap: Callable[[Status], T],
        buffers: Sequence[Buffer] = (),
    ) -> list[T]:
        """One answer a key; ``buffers`` are those of the call."""
        answers: list[T] = []
        for key in keys:
            answer = self._answer(key, ctx, one, wrap)
            if answer is None:
                break
            answers.append(answer)
        answers.extend(wrap(Status.TIMED_OUT) for _ in range(len(keys) - len(answers)))
        return answers

    def _answer(
        self,
        key: bytes,
        ctx: OpContext,
        one: Callable[[bytes, float], T],
        wrap: Callable[[Status], T],
    ) -> T | None:
        """The answer for one key, or None past the deadline."""
        timeout_s = ctx.deadline_s - self._clock()
        if timeout_s <= 0:
            return None
        try:
            return one(key, timeout_s)
        except OSError as error:
            return wrap(status_of_oserror(error))


class TargetTooSmall(Exception):
    """Raised by `BatchLoop.get_one`: the value has ``nbytes`` bytes, more than the target."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.nbytes = nbytes


class ValueCorrupt(Exception):
    """Raised by `BatchLoop.get_one`: what is stored is not the whole value of one put."""
