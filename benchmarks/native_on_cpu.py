"""vLLM's own OffloadingConnector as a peer on a machine without an accelerator.

vLLM 0.32 refuses to make the offload worker on the CPU platform.  These specifications
keep vLLM's scheduler side, managers and file tier, and give it a worker that copies
blocks with numpy in one thread.  For models with one KV cache group.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class NumpyWorker(OffloadingWorker):
    def __init__(self, kv_caches: Any, blocks_per_chunk: int, region: SharedOffloadRegion) -> None:
        self._blocks_per_chunk = blocks_per_chunk
        self._pages = [
            t.tensor.view(torch.int8).view(-1, t.page_size_bytes).numpy() for t in kv_caches.tensors
        ]
        self._rows = [
            region.create_next_worker_view(p.shape[1] * blocks_per_chunk).numpy()
            for p in self._pages
        ]
        self._region = region
        self._pool = ThreadPoolExecutor(1)
        self._jobs: dict[int, Future[tuple[int, float]]] = {}

    def _copy(self, device: Any, host: Any, store: bool) -> tuple[int, float]:
        start, moved = perf_counter(), 0
        skip = device.block_indices[0] % self._blocks_per_chunk
        for i, block in enumerate(device.block_ids.tolist()):
            chunk, part = divmod(i + skip, self._blocks_per_chunk)
            row = int(host.block_ids[chunk])
            for pages, rows in zip(self._pages, self._rows):
                size = pages.shape[1]
                there = rows[row, part * size : (part + 1) * size]
                np.copyto(there, pages[block]) if store else np.copyto(pages[block], there)
                moved += size
        return moved, perf_counter() - start

    def submit_store(self, job_id: int, src: Any, dst: Any) -> bool:
        self._jobs[job_id] = self._pool.submit(self._copy, src, dst, True)
        return True

    def submit_load(self, job_id: int, src: Any, dst: Any) -> bool:
        self._jobs[job_id] = self._pool.submit(self._copy, dst, src, False)
        return True

    def get_finished(self) -> list[TransferResult]:
        done = [job_id for job_id, future in self._jobs.items() if future.done()]
        results = []
        for job_id in done:
            moved, seconds = self._jobs.pop(job_id).result()
            results.append(TransferResult(job_id, True, moved, seconds))
        return results

    def wait(self, job_ids: set[int]) -> None:
        for job_id in job_ids:
            if job_id in self._jobs:
                self._jobs[job_id].result()

    def shutdown(self) -> None:
        self._pool.shutdown()
        self._rows = []
        self._region.cleanup()


class NumpyTierSpec(TieringOffloadingSpec):
    def get_worker(self, kv_caches: Any) -> NumpyWorker:
        if not self._worker:
            parallel = self.config.parallel
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = NumpyWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker
