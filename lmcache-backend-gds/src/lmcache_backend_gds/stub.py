"""A libcuda without a device, for tests and the conformance suite: never for operation.

kvikio asks the driver of every buffer whether it is host memory, and does nothing without a
``libcuda.so.1``.  This one answers "not initialised" to everything, so kvikio moves host memory,
and `has_device` says no.  Compiled where it is asked for; needs a C compiler.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

from lmcache_backend_gds.driver import LIBCUDA
from lmcache_core.sdk import ConfigError

# A newer kvikio: add what "undefined symbol: cuX" names.
_NAMES = """
CtxCreate_v2 CtxCreate_v3 CtxCreate_v4 CtxDestroy_v2 CtxGetCurrent CtxGetDevice CtxGetId
CtxPopCurrent_v2 CtxPushCurrent_v2 CtxSynchronize DeviceGet DeviceGetAttribute DeviceGetCount
DevicePrimaryCtxRelease_v2 DevicePrimaryCtxRetain EventCreate EventDestroy_v2 EventQuery
EventRecord EventSynchronize LaunchHostFunc MemAlloc_v2 MemFreeHost MemFree_v2 MemGetAddressRange_v2
MemHostAlloc MemHostRegister_v2 MemHostUnregister MemcpyAsync MemcpyBatchAsync_v2
MemcpyDtoHAsync_v2 MemcpyHtoDAsync_v2 PointerGetAttribute PointerGetAttributes StreamCreate
StreamDestroy_v2 StreamGetCtx StreamGetDevice StreamGetId StreamQuery StreamSynchronize
StreamWaitEvent
"""
_NO_DEVICE, _NOT_INITIALISED = 100, 3


def source() -> str:
    """The library in C."""
    names = sorted({each for name in _NAMES.split() for each in (name, name.removesuffix("_v2"))})
    return "\n".join(
        [
            f"int cuInit(unsigned flags) {{ return {_NO_DEVICE}; }}",
            "int cuDriverGetVersion(int *version) { *version = 12090; return 0; }",
            *(f"int cu{name}(void) {{ return {_NOT_INITIALISED}; }}" for name in names),
            *(
                f"int cu{name}(int error, const char **text) "
                '{ *text = "no device: this libcuda is a stub"; return 0; }'
                for name in ("GetErrorName", "GetErrorString")
            ),
            "",
        ]
    )


def build(folder: Path) -> Path:
    """Compile ``libcuda.so.1`` into ``folder``; its path.

    Raises:
        ConfigError: no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ConfigError("no C compiler", backend="gds", hint="apt-get install gcc")
    code, library = folder / "stub.c", folder / LIBCUDA
    code.write_text(source())
    flags = ["-w", "-shared", "-fPIC", f"-Wl,-soname,{LIBCUDA}", "-o", str(library)]
    subprocess.run([compiler, *flags, str(code)], check=True, capture_output=True)
    return library


def load(library: Path) -> None:
    """Load it into this process: who asks for ``libcuda.so.1`` after that gets it."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
