"""One NIXL agent with its UCX plugin, as the channel needs it.

Without the library's progress thread, which takes a whole core also when nothing moves: whoever
waits calls `UcxAgent.progress`.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from lmcache_core.sdk import Buffer, ConfigError, ContractViolation, MemoryKind, Region

DRAM, VRAM = 0, 1
_NAMES = {DRAM: "DRAM", VRAM: "VRAM"}
_DOORMAT_BYTES = 4096
GREETING_BYTES = 8
_ANY_BACKEND: list[int] = []
Rows = list[tuple[int, int, int]]
"""(address, bytes, device) each."""


class State(enum.Enum):
    """Of a transfer in the library."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


def kind_of(memory: MemoryKind) -> int:
    """Of the library's kinds of memory: pinned host memory is host memory to it."""
    return VRAM if memory is MemoryKind.DEVICE else DRAM


class UcxAgent:
    """Every method takes ``lock``, which its users may hold already: the library's own locking is
    off.

    Args:
        api: of `lmcache_backend_nixl.library.load`.
        name: unique among all that may ever meet.

    Raises:
        ConfigError: the plugin can't be loaded here.
    """

    def __init__(self, api: ModuleType, name: str) -> None:
        self.name = name
        self.lock = threading.RLock()
        self._regions: dict[int, tuple[Region, Any]] = {}
        self._stretches: tuple[tuple[int, int, int], ...] = ()
        # Read by each peer when it connects: that makes UCX set up the path both ways.
        self._doormat = mmap.mmap(-1, _DOORMAT_BYTES)
        self.doormat = ctypes.addressof(ctypes.c_char.from_buffer(self._doormat))
        try:
            config = api.nixl_agent_config(enable_prog_thread=False, backends=[])
            self._agent: Any = api.nixl_agent(name, config)
            self._agent.create_backend("UCX", {})
            # The library's class in Python takes 3 us a transfer to do what these do.
            bindings = api.nixlBind
            self._bare: Any = self._agent.agent
            self._rows: Any = bindings.nixlXferDList
            self._kinds = {kind: self._agent.nixl_mems[name] for kind, name in _NAMES.items()}
            self._ops = dict(self._agent.nixl_ops)
            self._states = {
                bindings.NIXL_SUCCESS: State.DONE,
                bindings.NIXL_IN_PROG: State.RUNNING,
            }
            row = (self.doormat, _DOORMAT_BYTES, 0, "")
            self._held = self._agent.register_memory([row], mem_type="DRAM")
        except Exception as error:
            raise ConfigError(
                f"NIXL's plugin UCX does not load: {type(error).__name__}",
                backend="nixl+ucx",
                op="open",
                hint="pip install -U 'lmcache-backend-nixl[cu12]'; NIXL's log says what is missing",
            ) from error

    def register(self, region: Region) -> None:
        """Raises ContractViolation when the library refuses the memory."""
        kind = kind_of(region.memory)
        with self.lock:
            if region.region_id in self._regions:
                return
            try:
                row = (region.address, region.nbytes, 0, "")
                made = self._agent.register_memory([row], mem_type=_NAMES[kind])
            except Exception as error:
                raise ContractViolation(
                    f"region {region.region_id} can't be registered: {error}",
                    backend="nixl+ucx",
                    op="register",
                ) from error
            self._regions[region.region_id] = (region, made)
            self._map()

    def unregister(self, region: Region) -> None:
        """Unknown ones are fine."""
        with self.lock:
            held = self._regions.pop(region.region_id, None)
            if held is not None:
                self._map()
                self._agent.deregister_memory(held[1])

    def _map(self) -> None:
        self._stretches = tuple(
            (region.address, region.address + region.nbytes, kind_of(region.memory))
            for region, _ in self._regions.values()
        )

    def covers(self, buffers: Sequence[Buffer]) -> bool:
        """Whether all of each lies in one registered region of its kind."""
        stretches = self._stretches
        for buffer in buffers:
            at, end = buffer.address, buffer.address + buffer.nbytes
            kind = kind_of(buffer.memory)
            for start, stop, found in stretches:
                if start <= at and end <= stop and kind == found:
                    break
            else:
                return False
        return True

    def metadata(self) -> bytes:
        """Of the agent, with every registration."""
        with self.lock:
            return bytes(self._agent.get_agent_metadata())

    def add(self, metadata: bytes, name: str) -> bool:
        """Load a peer's metadata, again when it has changed; False when it is not of ``name``."""
        with self.lock:
            try:
                found = self._agent.add_remote_agent(metadata)
            except Exception:  # the library's own types, which differ by build
                return False
            return (found.decode() if isinstance(found, bytes) else found) == name

    def forget(self, name: str) -> None:
        """Drop a peer's metadata and the path to it."""
        with self.lock:
            try:
                self._agent.remove_remote_agent(name)
            except Exception:
                pass  # it was lost already

    def start(
        self, op: str, kinds: tuple[int, int], rows: tuple[Rows, Rows], peer: str
    ) -> tuple[int | None, State]:
        """A transfer's handle, or None when it can't be made, and its state.  Over shared memory
        the bytes are moved before this returns.

        Args:
            op: ``READ`` or ``WRITE``.
            kinds, rows: of our side, of the peer's.
        """
        with self.lock:
            handle = None
            try:
                near = self._rows(self._kinds[kinds[0]], rows[0])
                far = self._rows(self._kinds[kinds[1]], rows[1])
                handle = self._bare.createXferReq(self._ops[op], near, far, peer, b"", _ANY_BACKEND)
                return handle, self._states.get(self._bare.postXferReq(handle, b""), State.FAILED)
            except Exception:  # the library's own types, which differ by build
                # Some of it may run all the same.
                return handle, State.FAILED if handle is None else self.state(handle)

    def state(self, handle: int) -> State:
        """Of a transfer; a peer that is gone is FAILED."""
        with self.lock:
            try:
                return self._states.get(self._bare.getXferStatus(handle), State.FAILED)
            except Exception:
                return State.FAILED

    def release(self, handle: int) -> None:
        """Give a handle back."""
        with self.lock:
            try:
                self._bare.releaseXferReq(handle)
            except Exception:
                pass  # kept by the library until the agent ends

    def greet(self, peer: str, doormat: int) -> int | None:
        """Start to read a peer's doormat; a handle, or None."""
        near = [(self.doormat + _DOORMAT_BYTES // 2, GREETING_BYTES, 0)]
        return self.start("READ", (DRAM, DRAM), (near, [(doormat, GREETING_BYTES, 0)]), peer)[0]

    def progress(self) -> None:
        """Do what UCX wants from our processor.  NIXL's own notifications are nobody's here."""
        with self.lock:
            if self._agent is not None:
                try:
                    self._agent.get_new_notifs()
                except Exception:
                    pass  # a peer that is gone; its transfers tell

    def close(self) -> None:
        """Deregister everything and end the agent; after it nothing touches our memory on our
        behalf."""
        with self.lock:
            if self._agent is None:
                return
            for _, made in self._regions.values():
                self._agent.deregister_memory(made)
            self._regions.clear()
            self._agent.deregister_memory(self._held)
            self._held = self._agent = self._bare = None
