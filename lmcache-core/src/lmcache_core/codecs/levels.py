"""How strongly each level of `cachegen` compresses: the one table to tune."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

_KEYS = (0.53, 0.28, 0.22)
_VALUES = (0.60, 0.58, 0.44)
"""Steps for each third of the layers, as multiples of the scale of a layer's channels.  Measured
on SmolLM2-135M: what later layers' keys lose does most harm."""


class Level(NamedTuple):
    """One level.

    Attributes:
        keys: step of a channel as a multiple of its scale, for each third of the layers.
        values: the same for values.
        power: a channel's scale is its own deviation to this power, times the layer's common
            one to the rest: 1 makes every channel equally exact, 0 every difference.
        max_error: of `CodecInfo.max_error`.
    """

    keys: tuple[float, ...]
    values: tuple[float, ...]
    power: float
    max_error: float


def _scaled(factor: float, max_error: float) -> Level:
    keys, values = (tuple(factor * step for step in steps) for steps in (_KEYS, _VALUES))
    return Level(keys, values, 0.0, max_error)


LEVELS: Mapping[str, Level] = MappingProxyType(
    {"low": _scaled(0.5, 0.12), "medium": _scaled(1.1, 0.23), "high": _scaled(1.5, 0.31)}
)


def coarseness(level: Level, role: str, layer: int, layers: int) -> float:
    """Step of a channel as a multiple of its scale, in ``layer`` of all ``layers``."""
    groups = level.keys if role == "key" else level.values
    return groups[layer * len(groups) // layers]
