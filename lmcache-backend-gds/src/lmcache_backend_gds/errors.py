"""kvikio raises RuntimeError where the system said errno; here it becomes an OSError again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

_BY_TEXT = {os.strerror(number): number for number in errno.errorcode}


@contextmanager
def as_oserror() -> Iterator[None]:
    """What kvikio raises inside leaves as an OSError.

    Raises:
        OSError: see `oserror_of`.
    """
    try:
        yield
    except RuntimeError as error:
        raise oserror_of(error) from error


def oserror_of(error: RuntimeError) -> OSError:
    """The OSError that ``error`` tells of, known by the system's words at the end of its text.

    Unknown words, "EOF" and ENOENT are EIO.  The file is open before kvikio is asked, so ENOENT
    is never the file's absence; a libcuda that can't be loaded ends with the same words.
    """
    text = str(error)
    number = _BY_TEXT.get(text.rpartition(": ")[2].strip(), errno.EIO)
    return OSError(errno.EIO if number == errno.ENOENT else number, text)
