"""What a wrong backend is registered with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lmcache_core.sdk import HostServices, RemoteConnector

Make = Callable[[str, HostServices], RemoteConnector]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A wrong backend.

    Attributes:
        name: of its class.
        mistake: what is wrong with it.
        kills: the check that must FAIL.
        base: the harness that it is run with: memory, file, synced or redis.
    """

    name: str
    mistake: str
    kills: str
    base: str
    make: type[RemoteConnector]


def mutant(kills: str) -> Callable[[type], type]:
    """Register a class under the check that must find it; its docstring is the mistake."""

    def mark(made: type) -> type:
        made.kills = kills  # type: ignore[attr-defined]
        return made

    return mark


def collect(module: object, base: str) -> dict[str, Mutant]:
    """Every class of ``module`` that is registered."""
    return {
        name: Mutant(name, " ".join(each.__doc__.split()), vars(each)["kills"], base, each)
        for name, each in vars(module).items()
        if isinstance(each, type) and "kills" in vars(each)
    }
