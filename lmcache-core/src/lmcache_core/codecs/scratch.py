"""Memory that a thread's codecs use again, so that a call does not wait for page faults.

A thread keeps about as much as half of the largest payload that it encoded, and its stream.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KEPT_BYTES = 64 << 20
"""Larger arrays are not kept."""
_memory = threading.local()


def scratch(use: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """An array of this thread's, until its next call with the same ``use``; holds anything."""
    wanted = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    kept: dict[str, NDArray[np.uint8]] = _memory.__dict__.setdefault("kept", {})
    block = kept.get(use)
    if block is None or block.nbytes < wanted:
        block = np.empty(wanted, np.uint8)
        if wanted <= _KEPT_BYTES:
            kept[use] = block
    array: NDArray[Any] = block[:wanted].view(dtype).reshape(shape)
    return array
