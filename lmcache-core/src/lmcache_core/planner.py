"""Which chunk comes from which tier.  Pure."""

from __future__ import annotations

from collections.abc import Sequence


def plan(residency: Sequence[Sequence[bool]]) -> list[int]:
    """The tier of each chunk of the longest prefix that some tier holds.

    ``residency[t][i]`` says whether tier ``t`` (fastest first) has chunk ``i``; all rows
    have one length.  Returns one tier index a chunk, as many as the prefix is long.
    """
    chosen: list[int] = []
    for column in zip(*residency):
        for tier, present in enumerate(column):
            if present:
                chosen.append(tier)
                break
        else:
            break
    return chosen
