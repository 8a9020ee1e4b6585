"""The device side of page copies by torch: streams, events and copies on CUDA.

The only module of this package that imports torch, and only when it is used.  See docs/device.md
for what has run on hardware.

Sources: torch's notes "CUDA semantics" (a thread's current stream, asynchronous execution, pinned
memory) and `torch.cuda.Stream` (lower numbers are higher priorities); vLLM 0.32,
`_custom_ops.swap_blocks_batch` and its callers in v1/kv_offload/cpu/gpu_worker.py.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmcache_core.sdk.errors import ConfigError
from lmcache_core.transfer.copier import MAX_BATCH, MAX_IN_FLIGHT, DeviceCopier, DeviceCopy
from lmcache_core.transfer.page_moves import CopyBatch, LayerPages, PageMove

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceCopier", "DeviceCopy", "PageMove", "TorchApi", "layer_pages", "torch_copier"]


def torch_copier(
    layers: Sequence[torch.Tensor],
    host: NDArray[np.uint8],
    *,
    warn: Callable[[str], None],
    max_batch: int = MAX_BATCH,
    max_in_flight: int = MAX_IN_FLIGHT,
) -> DeviceCopier:
    """A copier of real tensors; it keeps them and ``host`` until its `close` has succeeded.

    Args:
        layers: uint8 ``[blocks, page_bytes]`` each, pages contiguous, of one device.
        host: uint8 ``[nbytes]``, the arena's array, pinned before (`Arena.pin`).
        warn, max_batch, max_in_flight: of `DeviceCopier`.

    Raises:
        ConfigError: tensors of another form, or of a device that is neither CUDA nor CPU.
    """
    pages = [layer_pages(tensor) for tensor in layers]
    return DeviceCopier(
        pages, TorchApi(layers, host), warn=warn, max_batch=max_batch, max_in_flight=max_in_flight
    )


def layer_pages(pages: torch.Tensor) -> LayerPages:
    """Geometry of a tensor uint8 ``[blocks, page_bytes]``.

    Raises:
        ConfigError: another form, or bytes of a page that are not contiguous.
    """
    if pages.dim() != 2 or pages.element_size() != 1 or pages.stride(1) != 1:
        raise ConfigError(
            f"pages of shape {tuple(pages.shape)}, strides {pages.stride()}, {pages.dtype}",
            op="device",
            hint="give each layer as uint8 [blocks, page_bytes] with contiguous pages",
        )
    allocation = pages.untyped_storage().data_ptr()
    blocks, page_bytes = pages.shape
    return LayerPages(pages.data_ptr(), blocks, page_bytes, pages.stride(0), allocation)


class TorchApi:
    """`DeviceApi` over torch: CUDA (and ROCm, by the same names).  On the CPU streams are no-ops
    and copies are made at once: for tests.

    Pinned memory goes through ``vllm._custom_ops.swap_blocks_batch`` where the engine has
    loaded it and its extension has it (looked for once, here); else one ``copy_`` a run.
    """

    def __init__(self, layers: Sequence[torch.Tensor], host: NDArray[np.uint8]) -> None:
        import torch

        self._torch = torch
        self._device = layers[0].device
        if self._device.type not in ("cuda", "cpu") or {t.device for t in layers} != {self._device}:
            raise ConfigError(
                f"no page copies for {sorted({str(t.device) for t in layers})}",
                op="device",
                hint="layers of one CUDA device",
            )
        self._cuda = self._device.type == "cuda"
        with torch.inference_mode(False):  # else no other thread could write these tensors
            self._host = torch.from_numpy(host)
            flat = {t.untyped_storage().data_ptr(): _flat(torch, t) for t in layers}
        self._storages = sorted(flat.items())
        self.host_address, self.host_nbytes = self._host.data_ptr(), host.nbytes
        self.pinned = not self._cuda or bool(self._host.is_pinned())
        self._swap = _find_swap(torch) if self._cuda and self.pinned else None

    def compute_stream(self) -> Any:
        return self._torch.cuda.current_stream(self._device) if self._cuda else None

    def new_stream(self, *, high_priority: bool) -> Any:
        if not self._cuda:
            return self._torch.cpu.Stream()
        return self._torch.cuda.Stream(self._device, priority=-1 if high_priority else 0)

    def record(self, stream: Any) -> Any:
        # Blocking: a thread that waits for it sleeps, rather than takes a core from the engine.
        event = self._torch.cuda.Event(blocking=True) if self._cuda else self._torch.cpu.Event()
        event.record(stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        event.wait(stream)

    def copy(self, stream: Any, batch: CopyBatch, *, to_host: bool) -> None:
        with self._torch.cuda.stream(stream) if self._cuda else nullcontext():
            if self._swap is not None:
                arrays = (batch.sources, batch.targets, batch.nbytes)
                tensors = [self._torch.from_numpy(array) for array in arrays]
                # Any order only for loads: a store's source is written by the compute stream
                # until the event that this stream waits for.
                self._swap(*tensors, is_src_access_order_any=not to_host)
                return
            host, device = batch.targets, batch.sources
            if not to_host:
                host, device = device, host
            for h, d, n in zip(host.tolist(), device.tolist(), batch.nbytes.tolist()):
                at_host = self._host.narrow(0, h - self.host_address, n)
                target, source = (at_host, self._at(d, n)) if to_host else (self._at(d, n), at_host)
                target.copy_(source, non_blocking=True)

    def query(self, event: Any) -> bool:
        return bool(event.query())

    def synchronize(self, event: Any) -> None:
        event.synchronize()

    def _at(self, address: int, nbytes: int) -> torch.Tensor:
        base, flat = self._storages[bisect_right(self._storages, address, key=lambda s: s[0]) - 1]
        return flat.narrow(0, address - base, nbytes)


def _flat(torch: Any, tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage of ``tensor``, uint8 ``[nbytes]``."""
    storage = tensor.untyped_storage()
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    flat: torch.Tensor = empty.set_(storage, 0, (storage.nbytes(),), (1,))
    return flat


def _find_swap(torch: Any) -> Callable[..., None] | None:
    """vLLM's batched copy, private to it.  Not imported: an engine that has it loaded it."""
    swap = getattr(sys.modules.get("vllm._custom_ops"), "swap_blocks_batch", None)
    return swap if hasattr(torch.ops._C_cache_ops, "swap_blocks_batch") else None
