"""Deletes of one tier: at once, or behind the put of the same key; and what a store can list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from lmcache_core.sdk import OpContext, RemoteConnector, Status, SupportsScan
from lmcache_core.tiers.calls import Calls
from lmcache_core.tiers.quota import Quota
from lmcache_core.transfer.executor import Lane

Ended = Callable[[list[bytes]], None]
"""Told, once, the keys that could not be removed."""
MAX_SCANNED = 16_384
"""Keys that one `Removals.scan` gives."""


@dataclass(slots=True)
class _Removal:
    """Some keys, and who is told when all of them are decided."""

    left: int
    ended: Ended
    kept: list[bytes] = field(default_factory=list)

    def decide(self, key: bytes, gone: bool) -> None:
        """One key is decided."""
        self.left -= 1
        if not gone:
            self.kept.append(key)
        if not self.left:
            self.ended(self.kept)


class Removals:
    """Owner thread only.

    Args:
        after: called when deletes have ended, with whether all of them are gone: room may be free.
    """

    def __init__(
        self,
        connector: RemoteConnector,
        calls: Calls,
        quota: Quota,
        *,
        max_batch: int,
        after: Callable[[bool], None],
    ) -> None:
        self._connector = connector
        self._calls = calls
        self._quota = quota
        self._max_batch = max_batch
        self._after = after
        self._behind: dict[bytes, list[_Removal]] = {}

    @property
    def can_scan(self) -> bool:
        """Whether the store can list what it holds."""
        return self._connector.capabilities.scan and isinstance(self._connector, SupportsScan)

    def remove(self, keys: Sequence[bytes], ended: Ended = lambda kept: None) -> None:
        """Delete ``keys``; one that is being put is deleted when that has ended."""
        keys = list(dict.fromkeys(keys))
        if not keys:
            ended([])
            return
        removal = _Removal(len(keys), ended)
        now = []
        for key in keys:
            if self._quota.is_writing(key):
                self._behind.setdefault(key, []).append(removal)
            else:
                now.append(key)
        for start in range(0, len(now), self._max_batch):
            batch = now[start : start + self._max_batch]
            self._delete(batch, [removal] * len(batch))

    def put_ended(self, keys: Sequence[bytes]) -> None:
        """Puts of ``keys`` have ended: delete those that had to wait for it."""
        for key in keys:
            waiting = self._behind.pop(key, ())
            for removal in waiting:
                self._delete([key], [removal])

    def scan(self, prefix: bytes, found: Callable[[list[bytes], bool], None]) -> None:
        """List keys that start with ``prefix``; ``found`` gets some, and whether these are all.

        Nothing and False where the store can't be asked now.
        """
        keys: list[bytes] = []
        whole = False

        def run(ctx: OpContext) -> list[Status]:
            nonlocal whole
            assert isinstance(self._connector, SupportsScan)
            for entry in self._connector.scan(prefix, ctx):
                keys.append(entry.key)
                if len(keys) >= MAX_SCANNED:
                    return [Status.OK]
            whole = True
            return [Status.OK]

        def answered(statuses: list[Status]) -> None:
            told = statuses[0] is Status.OK
            found(keys if told else [], whole and told)

        self._calls.start("scan", Lane.STORE, 1, run, answered)

    def _delete(self, batch: list[bytes], removals: Sequence[_Removal]) -> None:
        self._quota.delete_started(batch)
        self._calls.start(
            "delete",
            Lane.STORE,
            len(batch),
            partial(self._connector.delete, batch),
            partial(self._deleted, batch, removals),
        )

    def _deleted(
        self, batch: Sequence[bytes], removals: Sequence[_Removal], statuses: Sequence[Status]
    ) -> None:
        gone = [key for key, status in zip(batch, statuses) if status is Status.OK]
        self._quota.delete_ended(batch, gone)
        self._after(len(gone) == len(batch))
        for key, removal, status in zip(batch, removals, statuses):
            removal.decide(key, status is Status.OK)
