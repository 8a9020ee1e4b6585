"""numba, behind one typed door.

Only the modules of kernels import this one, and they are imported at a codec's first use: numba
that is loaded before vLLM starts must not be seen by it (`_hide_llvmlite`), and is an extra.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding.ffi
import numba

Kernel = Callable[..., Any]
_OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


def compiled(signature: str) -> Callable[[Kernel], Kernel]:
    """Compile now, without the interpreter's lock, strict IEEE arithmetic; kept on disk when
    numba finds a directory that it may write, else compiled in every process.

    A kernel may call those of its own file only: numba's cache looks for changes in no other.

    Args:
        signature: numba's short form, such as ``"i8(u1[::1], f4[:, ::1])"``.
    """

    def decorate(function: Kernel) -> Kernel:
        try:
            done: Kernel = numba.njit(signature, cache=True, **_OPTIONS)(function)
        except Exception:  # of the cache: "no locator available", a full disk, a broken file
            done = numba.njit(signature, **_OPTIONS)(function)
        return done

    return decorate


def inlined(function: Kernel) -> Kernel:
    """A small part of kernels, compiled into each."""
    done: Kernel = numba.njit(**_OPTIONS)(function)
    return done


def _hide_llvmlite() -> None:
    """Give llvmlite's library proxy the ``__dict__`` that it answers with a function wrapper.

    vLLM's ``triton_utils/dispatcher.py`` calls ``vars()`` on what it finds in loaded modules;
    the proxy's ``__getattr__`` makes up a foreign function for any name.
    """
    table = getattr(getattr(llvmlite.binding.ffi, "lib", None), "_fntab", None)
    if isinstance(table, dict):
        table.setdefault("__dict__", {})


_hide_llvmlite()
