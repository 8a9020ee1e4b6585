"""`check_ranges`: numbers that an operator gave, against what a backend can take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmcache_core.sdk.errors import ConfigError


def check_ranges(
    options: Mapping[str, Any], ranges: Mapping[str, tuple[float, float]], *, backend: str
) -> None:
    """Refuse the first option outside of its range.

    Args:
        options: by name, as a hook gets them.
        ranges: lowest and highest value of each that has some.
        backend: for the error.

    Raises:
        ConfigError: an option is too small or too large.
    """
    for name, (low, high) in ranges.items():
        if not low <= options[name] <= high:
            raise ConfigError(
                f"{name}={options[name]} is out of range",
                backend=backend,
                op="open",
                hint=f"give {low} to {high}",
            )
