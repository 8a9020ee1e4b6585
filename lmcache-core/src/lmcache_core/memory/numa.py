"""Placement of memory on one NUMA node, best effort, through libnuma."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

Loader = Callable[[str], Any]
"""Loads a shared library by name, like `ctypes.CDLL`; raises OSError when it can't."""

_LIBRARIES = ("libnuma.so.1", "libnuma.so")
_MPOL_PREFERRED = 1
_MAX_NODE = 1023
_WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


def load_library(name: str) -> Any:
    """The default `Loader`: keeps errno for `ctypes.get_errno`."""
    return ctypes.CDLL(name, use_errno=True)


def bind(
    address: int,
    nbytes: int,
    node: int,
    *,
    load: Loader = load_library,
    warn: Callable[[str], None],
) -> bool:
    """Place the pages of ``[address, address + nbytes)`` on ``node`` when first touched.

    The node is preferred, not forced: a full node spills over instead of killing the
    process.  Both arguments are page aligned.  Thread-safe.

    Returns:
        Whether the kernel took the policy.  Any failure (no library, no symbol, every
        error code) is False with exactly one warning; nothing is raised.
    """
    try:
        why = _bind(address, nbytes, node, load)
    except Exception as error:  # a foreign library: whatever goes wrong, go on unbound
        why = f"{type(error).__name__}: {error}"
    if why:
        warn(f"memory is not bound to NUMA node {node}: {why}")
    return not why


def _bind(address: int, nbytes: int, node: int, load: Loader) -> str:
    """Reason of the failure, "" when bound."""
    if not 0 <= node <= _MAX_NODE:
        return f"node numbers are 0 to {_MAX_NODE}"
    library, why = _first(load)
    if library is None:
        return why
    library.numa_available.restype = ctypes.c_int
    library.numa_available.argtypes = []
    if library.numa_available() < 0:
        return "NUMA is not available on this host"
    mbind = library.mbind
    mbind.restype = ctypes.c_long
    mbind.argtypes = [
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_uint,
    ]
    words = node // _WORD_BITS + 1
    mask = (ctypes.c_ulong * words)()
    mask[node // _WORD_BITS] = 1 << (node % _WORD_BITS)
    ctypes.set_errno(0)
    # The kernel drops one from maxnode, hence the + 1.
    code = mbind(
        address, nbytes, _MPOL_PREFERRED, ctypes.addressof(mask), words * _WORD_BITS + 1, 0
    )
    if code == 0:
        return ""
    error = ctypes.get_errno()
    return f"mbind returned {code} ({os.strerror(error) if error else 'no errno'})"


def _first(load: Loader) -> tuple[Any, str]:
    why = "libnuma is not installed"
    for name in _LIBRARIES:
        try:
            return load(name), ""
        except OSError as error:
            why = f"libnuma can't be loaded ({error})"
    return None, why
