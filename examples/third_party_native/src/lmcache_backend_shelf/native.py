"""The native library: compiled once, called with the interpreter's lock released."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("shelf.c")


def compiler() -> str | None:
    """The C compiler, if there is one."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def load() -> ctypes.CDLL:
    """The library, built at first use.

    Raises:
        OSError: it can't be built or loaded.
    """
    name = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"lmcache-shelf-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder} belongs to another user")
    built = folder / f"shelf-{name}.so"
    if not built.exists():
        fresh = built.with_suffix(f".{os.getpid()}")
        command = [compiler() or "cc", "-shared", "-fPIC", "-O2", "-pthread", "-o", str(fresh)]
        subprocess.run([*command, str(SOURCE)], check=True, capture_output=True)
        fresh.rename(built)
    found = ctypes.CDLL(str(built), use_errno=True)
    size, at, text = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_char_p
    number = ctypes.c_int
    found.shelf_start.argtypes = [number, text, text, at, size, ctypes.c_int64, number]
    found.shelf_start.restype = at
    found.shelf_wait.argtypes = [
        at, ctypes.c_double, ctypes.POINTER(number), ctypes.POINTER(size),
    ]  # fmt: skip
    found.shelf_register.argtypes = found.shelf_unregister.argtypes = [at, size]
    return found
