"""kvikio's RuntimeErrors, told apart by the system's words in them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from gds_support import needs_kvikio

from lmcache_backend_gds.errors import as_oserror, oserror_of
from lmcache_core.sdk import Status, status_of_oserror

AT = "KvikIO failure at: /src/posix_io.hpp:90: "


@pytest.mark.parametrize(
    ("text", "number", "status"),
    [
        ("POSIX error on pwrite: No space left on device", errno.ENOSPC, Status.REJECTED),
        ("POSIX error on pwrite: Disk quota exceeded", errno.EDQUOT, Status.REJECTED),
        ("POSIX error on pwrite: File too large", errno.EFBIG, Status.REJECTED),
        ("POSIX error on pread: Input/output error", errno.EIO, Status.FAILED),
        ("POSIX error on pread: EOF", errno.EIO, Status.FAILED),
        ("Unable to open file. Linux system/library function call error at: /src/file_utils.cpp:"
         "160: Too many open files", errno.EMFILE, Status.FAILED),
        ("cuFile error: GPUDirect Storage not supported on current file", errno.EIO, Status.FAILED),
        ("CUDA error at: /src/utils.cpp:101: CUDA_ERROR_INVALID_VALUE(invalid argument)",
         errno.EIO, Status.FAILED),
        ("", errno.EIO, Status.FAILED),
    ],
)  # fmt: skip
def test_the_answer_follows_from_the_text(text: str, number: int, status: Status) -> None:
    error = oserror_of(RuntimeError(AT + text))
    assert error.errno == number
    assert status_of_oserror(error) is status


def test_a_library_that_is_missing_is_no_value_that_is_missing() -> None:
    text = "libcuda.so.1: cannot open shared object file: No such file or directory"
    assert status_of_oserror(oserror_of(RuntimeError(AT + text))) is Status.FAILED


def test_other_exceptions_pass() -> None:
    with pytest.raises(TypeError), as_oserror():
        raise TypeError("no buffer")


@needs_kvikio
def test_kvikio_says_what_the_system_said(tmp_path: Path) -> None:
    import kvikio

    with pytest.raises(RuntimeError) as caught:
        kvikio.CuFile(f"{tmp_path}/none", "r")
    assert str(caught.value).endswith(f": {os.strerror(errno.ENOENT)}")
    with pytest.raises(OSError) as mapped, as_oserror():
        kvikio.CuFile(str(tmp_path), "r+")
    assert mapped.value.errno == errno.EISDIR
