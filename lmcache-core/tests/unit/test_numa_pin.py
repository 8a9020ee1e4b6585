"""NUMA and CUDA: whatever the library answers, False, one warning, no exception."""

from __future__ import annotations

import ctypes
import errno
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lmcache_core.memory import numa
from lmcache_core.memory.pin import HostPinner

CUDA_ERRORS = (1, 2, 3, 100, 201, 700, 712, 713, 801, 999)
CUDART = """
static int register_code, unregister_code, cleared;
void set_codes(int r, int u) { register_code = r; unregister_code = u; cleared = 0; }
int was_cleared(void) { return cleared; }
int cudaHostRegister(void *p, unsigned long n, unsigned f) { return register_code; }
int cudaHostUnregister(void *p) { return unregister_code; }
int cudaGetLastError(void) { cleared++; return 0; }
"""
NUMA = """
#include <errno.h>
static int available, error;
static unsigned long mask[16], maxnode; static int mode;
void set_codes(int a, int e) { available = a; error = e; }
unsigned long mask_word(int i) { return mask[i]; }
unsigned long seen_maxnode(void) { return maxnode; }
int numa_available(void) { return available; }
long mbind(void *p, unsigned long n, int m, const unsigned long *nodes, unsigned long max,
           unsigned flags) {
    mode = m; maxnode = max;
    for (unsigned long i = 0; i < (max - 1) / 64; i++) mask[i] = nodes[i];
    if (error) { errno = error; return -1; }
    return 0;
}
"""


def compile_library(directory: Path, source: str) -> ctypes.CDLL:
    """``source`` (C) as a loaded library; skips, saying so, where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the fake library")
    code, library = directory / "fake.c", directory / "libfake.so"
    code.write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, code], check=True)
    return ctypes.CDLL(str(library), use_errno=True)


def missing(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.fixture(scope="module")
def cudart(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_library(tmp_path_factory.mktemp("cudart"), CUDART)


@pytest.fixture(scope="module")
def libnuma(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_library(tmp_path_factory.mktemp("numa"), NUMA)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_library(tmp_path_factory.mktemp("empty"), "int nothing(void) { return 0; }")


def test_memory_is_pinned_and_unpinned_silently(cudart: ctypes.CDLL) -> None:
    warnings: list[str] = []
    cudart.set_codes(0, 0)
    pinner = HostPinner(load=lambda name: cudart, warn=warnings.append)
    assert pinner.register(4096, 4096) and pinner.unregister(4096)
    assert warnings == []


@pytest.mark.parametrize("code", CUDA_ERRORS)
def test_every_register_error_is_false_with_one_warning(cudart: ctypes.CDLL, code: int) -> None:
    warnings: list[str] = []
    cudart.set_codes(code, 0)
    pinner = HostPinner(load=lambda name: cudart, warn=warnings.append)
    assert not pinner.register(4096, 4096)
    assert not pinner.register(8192, 4096)
    assert not pinner.unregister(4096)
    assert len(warnings) == 1 and str(code) in warnings[0]
    assert cudart.was_cleared() == 2, "the engine must not find our error"


@pytest.mark.parametrize("code", CUDA_ERRORS)
def test_every_unregister_error_is_false_with_one_warning(cudart: ctypes.CDLL, code: int) -> None:
    warnings: list[str] = []
    cudart.set_codes(0, code)
    pinner = HostPinner(load=lambda name: cudart, warn=warnings.append)
    assert pinner.register(4096, 4096)
    assert not pinner.unregister(4096)
    assert len(warnings) == 1 and str(code) in warnings[0]


def test_no_cuda_library_is_one_warning() -> None:
    warnings: list[str] = []
    tried: list[str] = []

    def load(name: str) -> Any:
        tried.append(name)
        return missing(name)

    pinner = HostPinner(load=load, warn=warnings.append)
    assert not pinner.register(4096, 4096) and not pinner.register(4096, 4096)
    assert len(warnings) == 1
    assert tried[:3] == ["libcudart.so", "libcudart.so.13", "libcudart.so.12"]


def test_a_later_name_is_enough(cudart: ctypes.CDLL) -> None:
    cudart.set_codes(0, 0)
    pinner = HostPinner(
        load=lambda name: cudart if name.endswith(".12") else missing(name), warn=pytest.fail
    )
    assert pinner.register(4096, 4096)


def test_a_cuda_library_without_symbols_is_one_warning(empty: ctypes.CDLL) -> None:
    warnings: list[str] = []
    pinner = HostPinner(load=lambda name: empty, warn=warnings.append)
    assert not pinner.register(4096, 4096) and not pinner.register(4096, 4096)
    assert len(warnings) == 1


def test_a_loader_that_breaks_is_one_warning() -> None:
    def load(name: str) -> Any:
        raise RuntimeError("driver mismatch")

    warnings: list[str] = []
    assert not HostPinner(load=load, warn=warnings.append).register(4096, 4096)
    assert not numa.bind(4096, 4096, 0, load=load, warn=warnings.append)
    assert len(warnings) == 2


@pytest.mark.parametrize("node", [0, 1, 63, 64, 1023])
def test_exactly_the_node_is_asked_for(libnuma: ctypes.CDLL, node: int) -> None:
    libnuma.set_codes(0, 0)
    libnuma.mask_word.restype = ctypes.c_ulong
    libnuma.seen_maxnode.restype = ctypes.c_ulong
    assert numa.bind(4096, 4096, node, load=lambda name: libnuma, warn=pytest.fail)
    words = node // 64 + 1
    assert libnuma.seen_maxnode() == words * 64 + 1
    asked = [libnuma.mask_word(i) for i in range(words)]
    assert asked == [0] * (words - 1) + [1 << node % 64]


@pytest.mark.parametrize("code", [1, errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EIO])
def test_every_mbind_error_is_false_with_one_warning(libnuma: ctypes.CDLL, code: int) -> None:
    warnings: list[str] = []
    libnuma.set_codes(0, code)
    assert not numa.bind(4096, 4096, 0, load=lambda name: libnuma, warn=warnings.append)
    assert len(warnings) == 1


def test_no_numa_on_the_host_is_one_warning(libnuma: ctypes.CDLL) -> None:
    warnings: list[str] = []
    libnuma.set_codes(-1, 0)
    assert not numa.bind(4096, 4096, 0, load=lambda name: libnuma, warn=warnings.append)
    assert len(warnings) == 1


@pytest.mark.parametrize("node", [-1, 1024, 1 << 40])
def test_impossible_nodes_are_one_warning(libnuma: ctypes.CDLL, node: int) -> None:
    warnings: list[str] = []
    assert not numa.bind(4096, 4096, node, load=lambda name: libnuma, warn=warnings.append)
    assert len(warnings) == 1


def test_no_numa_library_or_no_symbols_is_one_warning(empty: ctypes.CDLL) -> None:
    for load in (missing, lambda name: empty):
        warnings: list[str] = []
        assert not numa.bind(4096, 4096, 0, load=load, warn=warnings.append)
        assert len(warnings) == 1
