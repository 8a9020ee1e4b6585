"""The control plane: three hooks that a backend's module implements (pluggy).

The docstring of each hook is its contract.  The data path is the plain object that
`lmcache_open_connector` returns; no hook is called on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pluggy

from lmcache_core.sdk.buffers import Region, ReleaseToken
from lmcache_core.sdk.capabilities import Capabilities
from lmcache_core.sdk.connector import RemoteConnector

PROJECT = "lmcache"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks the functions of a backend's module that implement `BackendHooks`."""

OptionValue = str | int | float | bool
"""What a validated option is, by its `OptionSpec.type`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionSpec:
    """One option of a backend, given as a URL parameter or in the tier's YAML.

    Attributes:
        name: as written by the operator.
        type: ``str``, ``int``, ``float`` or ``bool``; core converts and validates.
        default: used when absent.
        unit: such as ``"bytes"`` or ``"s"``; "" when it has none.
        secret: redacted in every log and error.
        help: one line.
        choices: the allowed values; empty when any is fine.
    """

    name: str
    type: type[str] | type[int] | type[float] | type[bool]
    default: OptionValue
    unit: str = ""
    secret: bool = False
    help: str = ""
    choices: tuple[OptionValue, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendInfo:
    """What a backend is, told without opening it.

    Attributes:
        name: short name, also the conformance harness's.
        version: of the backend's distribution.
        schemes: URL schemes, equal to its entry points' names.
        api_min: lowest `API_VERSION` that it runs with.
        api_tested: highest one that it was tested with.
        options: every option it understands; any other is an error.
        url_help: one line, such as ``"file:///absolute/directory"``.
        capabilities: what a connector claims with default options, where that is known
            without opening one.
    """

    name: str
    version: str
    schemes: tuple[str, ...]
    api_min: tuple[int, int]
    api_tested: tuple[int, int]
    options: tuple[OptionSpec, ...] = ()
    url_help: str = ""
    capabilities: Capabilities | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Whether a backend can work here: the reason and, when it can't, the fix."""

    usable: bool
    reason: str
    hint: str = ""


class Counter(Protocol):
    """A monotonic metric."""

    def inc(self, amount: int = 1) -> None:
        """Add ``amount``; thread-safe."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HostServices:
    """What core lends to a connector for its life.

    Attributes:
        logger: named after the backend.
        counter: gives the counter of a name, shown with core's metrics.
        clock: monotonic seconds, the clock of `OpContext.deadline_s`.
        tmp_dir: a directory for scratch files, 0700.
        regions: the memory regions that buffers come from.
        on_region_added, on_region_removed: register a callback.
        released: call once when a buffer answered ABANDONED can't be touched any more.
    """

    logger: logging.Logger
    counter: Callable[[str], Counter]
    clock: Callable[[], float]
    tmp_dir: Path
    regions: Callable[[], tuple[Region, ...]]
    on_region_added: Callable[[Callable[[Region], None]], None]
    on_region_removed: Callable[[Callable[[Region], None]], None]
    released: Callable[[ReleaseToken], None]


class BackendHooks:
    """Specification of the hooks; a backend implements them as module functions."""

    @hookspec(firstresult=True)
    def lmcache_backend_info(self) -> BackendInfo:
        """Describe the backend.  Pure: no I/O, no native import."""
        raise AssertionError("specification only")

    @hookspec(firstresult=True)
    def lmcache_probe(self, url: str, options: Mapping[str, Any]) -> Probe:
        """Say whether the backend can work here, with the reason and the fix.

        Runs in a child process that core kills after 2 s; has no side effect.
        """
        raise AssertionError("specification only")

    @hookspec(firstresult=True)
    def lmcache_open_connector(
        self, url: str, options: Mapping[str, Any], host: HostServices
    ) -> RemoteConnector:
        """Open the data path.

        ``url`` has no options left in it; ``options`` is validated, complete and frozen.

        Raises:
            ConfigError: the URL is wrong for this backend.
            BackendUnavailable: the store can't be reached now.
        """
        raise AssertionError("specification only")
