"""Whether Mooncake's library is here, and what brings it.  Loads nothing."""

from __future__ import annotations

import ctypes.util
import importlib.util
import sys
from pathlib import Path

INSTALL = "pip install 'lmcache-backend-mooncake[cpu]'"
_VERBS = "apt-get install libibverbs1"


def folder() -> Path | None:
    """Of the module ``mooncake``, or None."""
    try:
        found = importlib.util.find_spec("mooncake")
    except (ImportError, ValueError):
        return None
    places = list(found.submodule_search_locations or ()) if found else []
    return next((Path(place) for place in places if (Path(place) / "store.so").exists()), None)


def missing() -> tuple[str, str] | None:
    """What is missing and the command that installs it, or None."""
    if folder() is None:
        why = "Mooncake's library is not installed"
        if sys.version_info >= (3, 14):
            return why, "its wheels end with Python 3.13; use an older Python"
        return why, f"{INSTALL}, or [cuda] where CUDA 12 is installed"
    if ctypes.util.find_library("ibverbs") is None:
        return "libibverbs.so.1 is missing, which Mooncake is linked with", _VERBS
    return None


def hint_of(message: str) -> str:
    """The command that cures an ImportError."""
    if "libibverbs" in message:
        return _VERBS
    if "libcud" in message or "libmlx5" in message:
        return f"pip uninstall mooncake-transfer-engine; {INSTALL} (or install CUDA 12 and rdma)"
    return INSTALL


def program(name: str) -> str:
    """Path of a program of the wheel, such as ``mooncake_master``.

    Raises:
        RuntimeError: it is not installed; the message says the fix.
    """
    found = folder()
    if found is None or not (found / name).exists():
        raise RuntimeError(f"{name} is not installed; try: {INSTALL}")
    return str(found / name)
