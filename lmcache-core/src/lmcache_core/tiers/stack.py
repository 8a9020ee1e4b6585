"""The tiers below host, in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from lmcache_core.tiers.remote import RemoteTier


class TierStack:
    """Fastest first.  Owner thread only.

    Attributes:
        readable: all of them.
        writable: those that are written at all.
        through: at once.
        on_evict: before host evicts.
    """

    def __init__(self, tiers: Sequence[RemoteTier]) -> None:
        self.readable = list(tiers)
        self.writable = [tier for tier in tiers if tier.config.write != "never"]
        self.through = [tier for tier in tiers if tier.config.write == "through"]
        self.on_evict = [tier for tier in tiers if tier.config.write == "on_evict"]

    @property
    def settling(self) -> bool:
        """Whether a call is in flight that is not overdue."""
        return any(tier.settling for tier in self.readable)

    def residency(
        self, keys: Sequence[bytes], answered: Callable[[int, list[bool], str], None]
    ) -> None:
        """Ask every tier for ``keys`` at once.

        ``answered`` gets, as each answers, its position, one answer a key, and why it could
        not be asked ("" when it could).
        """
        for position, tier in enumerate(self.readable):
            tier.exists(keys, partial(answered, position))

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove ``keys`` everywhere, in the background, also those that are to be put."""
        meant = set(keys).__contains__
        for tier in self.writable:
            tier.take_back(meant)
            tier.delete(keys)

    def delete_tag(self, tag: bytes) -> None:
        """Remove what each tier is known to hold of one namespace."""
        for tier in self.writable:
            tier.delete(tier.keys_of(tag))

    def tick(self) -> None:
        """Deadlines and probes of every tier."""
        for tier in self.readable:
            tier.tick()

    def close(self, timeout_s: float) -> bool:
        """Close all; False when a call still runs."""
        return all([tier.close(timeout_s) for tier in self.readable])
