"""The NIXL library, imported when a connector is opened; one agent with one plugin.

Interface: https://github.com/ai-dynamo/nixl (`nixl_agent`).  Failures of the library are exceptions
without an errno: callers find out by plain system calls, or by asking the store again.
"""

from __future__ import annotations

import importlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from lmcache_core.sdk import ConfigError, MemoryKind, Region

MODULES = ("nixl_cu12", "nixl_cu13")
_SPIN_S = 0.002
_PAUSE_S = 0.0002
_MEMORY = "DRAM"
"""What the storage plugins take."""
_ONE_TRY = {"AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": "1"}
_environment = threading.Lock()
_numbers = itertools.count()


class TransferFailed(Exception):
    """The library gave a transfer up, for the reason in its log."""


@dataclass(slots=True)
class Piece:
    """One stretch of memory and its counterpart.

    Attributes:
        address, nbytes: of the memory.
        device: file descriptor or object number.
        offset: of the counterpart.
        name: of an object; "" for a file.
    """

    address: int
    nbytes: int
    device: int
    offset: int = 0
    name: str = ""


def load(plugin: str, prefer: str = "auto") -> ModuleType:
    """The first installed build that has ``plugin``.

    Args:
        prefer: ``cu12``, ``cu13`` or ``auto``.

    Raises:
        ConfigError: none is installed, or none has the plugin; the hint is the line to run.
    """
    extra = "obj" if plugin == "OBJ" else "cu12"
    line = f"pip install 'lmcache-backend-nixl[{extra}]'"
    reasons: list[str] = []
    for name in MODULES:
        if prefer not in ("auto", name.rpartition("_")[2]):
            continue
        try:
            return importlib.import_module(f"{name}._api")
        except ImportError as error:
            reasons.append(str(error))
    raise ConfigError(
        f"NIXL can't be imported: {'; '.join(reasons)}", backend="nixl", op="open", hint=line
    )


class Agent:
    """One NIXL agent with one plugin; not thread-safe, so each call in flight has its own.

    Args:
        api: of `load`.
        plugin: such as ``"POSIX"``.
        parameters: of the plugin; may hold secrets.

    Raises:
        ConfigError: the plugin can't be loaded here.
    """

    def __init__(self, api: ModuleType, plugin: str, parameters: Mapping[str, str]) -> None:
        self._far = "FILE" if plugin == "POSIX" else "OBJ"
        self._plugin = plugin
        self._regions: dict[int, tuple[Region, Any]] = {}
        try:
            self._agent: Any = api.nixl_agent(
                f"lmcache-{next(_numbers)}", api.nixl_agent_config(backends=[])
            )
            with _one_try():
                self._agent.create_backend(plugin, dict(parameters))
        except Exception as error:
            raise ConfigError(
                f"NIXL's plugin {plugin} does not load: {type(error).__name__}",
                backend="nixl",
                op="open",
                hint=_fix_of(plugin),
            ) from error

    def use_regions(self, wanted: Mapping[int, Region]) -> None:
        """Have just these registered."""
        for number in [n for n, (r, _) in self._regions.items() if wanted.get(n) is not r]:
            self._agent.deregister_memory(self._regions.pop(number)[1])
        for number, region in wanted.items():
            if number not in self._regions and region.memory is not MemoryKind.DEVICE:
                row = (region.address, region.nbytes, 0, "")
                made = self._agent.register_memory([row], mem_type=_MEMORY)
                self._regions[number] = (region, made)

    def move(self, op: str, pieces: Sequence[Piece], clock: Callable[[], float]) -> None:
        """Move every piece, and wait: ``READ`` into memory, ``WRITE`` out of it.

        Raises:
            TransferFailed: at least one was not moved whole.
        """
        held: list[Any] = []
        handle = None
        try:
            loose = self._loose(pieces)
            if loose:
                rows = [(piece.address, piece.nbytes, 0, "") for piece in loose]
                held.append(self._agent.register_memory(rows, mem_type=_MEMORY))
            far = [(0, piece.offset + piece.nbytes, piece.device, piece.name) for piece in pieces]
            held.append(self._agent.register_memory(far, mem_type=self._far))
            near_rows = [(piece.address, piece.nbytes, 0) for piece in pieces]
            far_rows = [(piece.offset, piece.nbytes, piece.device) for piece in pieces]
            handle = self._agent.initialize_xfer(
                op,
                self._agent.get_xfer_descs(near_rows, mem_type=_MEMORY),
                self._agent.get_xfer_descs(far_rows, mem_type=self._far),
                self._agent.name,
            )
            self._wait(handle, clock)
        except TransferFailed:
            raise
        except Exception as error:  # the library's own types, which differ by build
            raise TransferFailed(f"{type(error).__name__}: {error}") from error
        finally:
            self._release(handle, held)

    def present(self, names: Sequence[str]) -> list[bool]:
        """Whether an object of each name is there.

        Raises:
            TransferFailed: the store does not say.
        """
        rows = [(0, 0, number, name) for number, name in enumerate(names)]
        try:
            found = self._agent.query_memory(rows, self._plugin, mem_type=self._far)
        except Exception as error:
            raise TransferFailed(f"{type(error).__name__}: {error}") from error
        return [each is not None for each in found]

    def close(self) -> None:
        """Give everything back; the agent is gone after."""
        self.use_regions({})
        self._agent = None

    def _wait(self, handle: Any, clock: Callable[[], float]) -> None:
        state = self._agent.transfer(handle)
        spun_s = clock() + _SPIN_S
        while state == "PROC":
            time.sleep(0 if clock() < spun_s else _PAUSE_S)
            state = self._agent.check_xfer_state(handle)
        if state != "DONE":
            raise TransferFailed(f"the transfer ended as {state}")

    def _release(self, handle: Any, held: Sequence[Any]) -> None:
        """Nothing may stay behind, whatever happened before."""
        try:
            if handle is not None:
                self._agent.release_xfer_handle(handle)
        finally:
            for each in held:
                self._agent.deregister_memory(each)

    def _loose(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Those that lie in no registered region."""
        first = min(piece.address for piece in pieces)
        end = max(piece.address + piece.nbytes for piece in pieces)
        if self._in_region(first, end - first):
            return []
        return [piece for piece in pieces if not self._in_region(piece.address, piece.nbytes)]

    def _in_region(self, address: int, nbytes: int) -> bool:
        for region, _ in self._regions.values():
            if 0 <= address - region.address <= region.nbytes - nbytes:
                return True
        return False


@contextmanager
def _one_try() -> Iterator[None]:
    """The plugin reads these when it makes its client, and has no parameter for them; else it tries
    ten times, for half a minute, whatever our deadline."""
    with _environment:
        before = {name: os.environ.get(name) for name in _ONE_TRY}
        os.environ.update(_ONE_TRY)
        try:
            yield
        finally:
            for name, text in before.items():
                if text is None:
                    del os.environ[name]
                else:
                    os.environ[name] = text


def _fix_of(plugin: str) -> str:
    if plugin == "OBJ":
        return "the S3 plugin loads in nixl-cu12: pip install 'lmcache-backend-nixl[obj]'"
    return "pip install -U 'lmcache-backend-nixl[cu12]'; NIXL's log says what is missing"
