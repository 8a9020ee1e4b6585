"""Registration of host memory with CUDA, best effort, through libcudart."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from lmcache_core.memory.numa import Loader, load_library

_LIBRARIES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12")
_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every CUDA context of the process."""


class HostPinner:
    """Pins host memory with ``cudaHostRegister``, so device copies run at full speed.

    The library is looked for at the first `register`, not before; `register` initialises
    CUDA in this process.  Any failure (no library, no symbol, every error code) answers
    False; the pinner warns exactly once in its life and never raises.  Thread-safe.

    Args:
        load: loads a library by name; raises OSError when it can't.
        warn: gets one line when pinning fails.
    """

    def __init__(self, *, load: Loader = load_library, warn: Callable[[str], None]) -> None:
        self._load = load
        self._warn = warn
        self._warned = False
        self._library: Any = None
        self._registered: set[int] = set()
        self._lock = threading.Lock()

    def register(self, address: int, nbytes: int) -> bool:
        """Pin ``[address, address + nbytes)``; True when it is pinned now."""
        with self._lock:
            why = self._guarded(lambda: self._register(address, nbytes))
            return self._answer(f"host memory of {nbytes} bytes is not pinned", why)

    def unregister(self, address: int) -> bool:
        """Unpin what `register` pinned at ``address``; True when it is unpinned now."""
        with self._lock:
            why = self._guarded(lambda: self._unregister(address))
            return self._answer("host memory is not unpinned", why)

    def _register(self, address: int, nbytes: int) -> str:
        if self._library is None:
            library, why = self._first()
            if library is None:
                return why
            library.cudaHostRegister.restype = ctypes.c_int
            library.cudaHostRegister.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
            library.cudaHostUnregister.restype = ctypes.c_int
            library.cudaHostUnregister.argtypes = [ctypes.c_void_p]
            self._library = library
        code = self._library.cudaHostRegister(address, nbytes, _PORTABLE)
        if code:
            return self._failed("cudaHostRegister", code)
        self._registered.add(address)
        return ""

    def _unregister(self, address: int) -> str:
        if address not in self._registered:
            return "it was not pinned here"
        self._registered.discard(address)
        code = self._library.cudaHostUnregister(address)
        return self._failed("cudaHostUnregister", code) if code else ""

    def _failed(self, function: str, code: int) -> str:
        # CUDA keeps the last error: cleared, lest the engine's next check finds ours.
        clear = getattr(self._library, "cudaGetLastError", None)
        if clear is not None:
            clear()
        return f"{function} returned error {code}"

    def _first(self) -> tuple[Any, str]:
        why = "libcudart is not installed"
        for name in _LIBRARIES:
            try:
                return self._load(name), ""
            except OSError as error:
                why = f"libcudart can't be loaded ({error})"
        return None, why

    def _guarded(self, call: Callable[[], str]) -> str:
        try:
            return call()
        except Exception as error:  # a foreign library: whatever goes wrong, go on unpinned
            return f"{type(error).__name__}: {error}"

    def _answer(self, what: str, why: str) -> bool:
        if why and not self._warned:
            self._warned = True
            self._warn(f"{what}: {why}")
        return not why
