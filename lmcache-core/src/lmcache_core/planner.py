"""Which chunk comes from which tier.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Plan(NamedTuple):
    """``tiers`` has the tier index of each chunk of the prefix.  Unless ``decided``, a tier
    that has not answered yet may still make the prefix longer."""

    tiers: list[int]
    decided: bool


def plan(residency: Sequence[Sequence[bool] | None]) -> Plan:
    """The longest prefix that the tiers which have answered hold.

    ``residency[t][i]`` says whether tier ``t`` (fastest first) has chunk ``i``; all rows
    have one length, and None is a tier that has not answered.
    """
    answered = [(tier, row) for tier, row in enumerate(residency) if row is not None]
    chosen: list[int] = []
    for column in zip(*(row for _, row in answered)):
        position = next((i for i, present in enumerate(column) if present), None)
        if position is None:
            return Plan(chosen, len(answered) == len(residency))
        chosen.append(answered[position][0])
    return Plan(chosen, bool(answered) or not residency)
