"""What this machine has for GPUDirect Storage: kvikio, libcuda, a device.

Nothing here imports kvikio.
"""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass

LIBCUDA = "libcuda.so.1"
INSTALL = "pip install 'lmcache-backend-gds[cu13]' (or [cu12]); a lean line is in the README"
ADDS = "the extra [cu13] or [cu12] with an NVIDIA driver adds reads and writes of device memory"


@dataclass(frozen=True, slots=True)
class Found:
    """What is here.

    Attributes:
        kvikio: it is installed.
        libcuda: the driver's library can be loaded; kvikio needs it, for host memory too.
    """

    kvikio: bool
    libcuda: bool

    @property
    def lacking(self) -> str:
        """What kvikio can't run without, or ""."""
        if not self.kvikio:
            return "kvikio is not installed"
        return "" if self.libcuda else f"{LIBCUDA} can't be loaded"

    @property
    def hint(self) -> str:
        """How to get what is lacking."""
        if not self.kvikio:
            return INSTALL
        return f"install the NVIDIA driver, which brings {LIBCUDA}, or use io=posix"


def look() -> Found:
    """What is here; loads at most libcuda, and does not start it."""
    kvikio = importlib.util.find_spec("kvikio") is not None
    return Found(kvikio, kvikio and _libcuda() is not None)


def has_device() -> bool:
    """Whether the driver starts (cuInit) and has a device."""
    library = _libcuda()
    if library is None or library.cuInit(0) != 0:
        return False
    count = ctypes.c_int(0)
    return bool(library.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0)


def _libcuda() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(LIBCUDA)
    except OSError:
        return None
