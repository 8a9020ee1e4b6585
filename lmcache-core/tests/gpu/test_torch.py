"""`TorchApi` with real torch and CPU tensors: addresses, storages, and which calls CUDA would get.

These calls are recorded, not run: nothing here shows how a GPU behaves.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: use `nox -s gpu`")

import device_rounds as rounds  # noqa: E402  torch first: without it this module is skipped
from torch_rig import TorchRig, tensors_of  # noqa: E402

from lmcache_core.sdk.errors import ConfigError  # noqa: E402
from lmcache_core.transfer import device as module  # noqa: E402
from lmcache_core.transfer.copier import DeviceCopier  # noqa: E402
from lmcache_core.transfer.device import PageMove, TorchApi, layer_pages, torch_copier  # noqa: E402


@pytest.mark.parametrize("outer", ["layer", "block", "apart"])
@pytest.mark.parametrize("seed", range(20))
def test_cpu_tensors_of_every_layout_end_with_the_bytes_of_a_plain_copy(
    outer: str, seed: int
) -> None:
    rng = random.Random(seed)
    pages = [rng.choice((16, 48, 1000)) for _ in range(3)]
    rig = TorchRig("cpu", outer=outer, pages=pages, gap=rng.choice((0, 8)), max_batch=3)
    for play in (rounds.store_round, rounds.load_round):
        play(rig, rounds.random_moves(rng, rig.layers, rig.host.nbytes), rng)
    rig.close()
    assert not rig.warnings


def test_pages_of_an_engine_tensor_keep_their_address_and_stride() -> None:
    cache = torch.zeros(5, 2, 4, 8, dtype=torch.float16)  # block-outer: 2 layers in a block
    pages = layer_pages(cache.view(torch.uint8).flatten(1)[:, 64:128])
    assert (pages.address - cache.data_ptr(), pages.blocks) == (64, 5)
    assert (pages.page_bytes, pages.block_stride) == (64, 128)
    assert pages.allocation == cache.untyped_storage().data_ptr()


def test_a_copier_made_in_inference_mode_loads_outside_of_it() -> None:
    with torch.inference_mode():
        rig = TorchRig("cpu")
    rig.host[:4096] = 5
    copy = rig.copier.submit([PageMove(2, 1, 1, 0)], to_host=False)
    assert copy.error() is None and rig.read_now((2, 1)).tolist() == [5] * 4096


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(4, 8, dtype=torch.float32),
        torch.zeros(4, 2, 8, dtype=torch.uint8),
        torch.zeros(8, 4, dtype=torch.uint8).t(),
    ],
)
def test_tensors_of_another_form_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError):
        layer_pages(wrong)


def test_devices_of_another_kind_are_refused() -> None:
    layers = [torch.zeros(4, 8, dtype=torch.uint8, device="meta")]
    with pytest.raises(ConfigError, match="meta"):
        TorchApi(layers, np.zeros(64, np.uint8))


class Recorder:
    """Takes the place of torch.cuda's streams and events, with their signatures."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.inside: list[Any] = []

    def stream_class(self, *args: Any, **kwargs: Any) -> str:
        inspect.signature(torch.cuda.Stream.__new__).bind(None, *args, **kwargs)
        return f"priority {kwargs['priority']}"

    def event_class(self, *args: Any, **kwargs: Any) -> Any:
        inspect.signature(torch.cuda.Event.__new__).bind(None, *args, **kwargs)
        recorder = self

        class Event:
            def record(self, stream: Any) -> None:
                recorder.calls.append(("record", stream))

            def wait(self, stream: Any) -> None:
                recorder.calls.append(("wait", stream))

            def query(self) -> bool:
                return True

            def synchronize(self) -> None:
                recorder.calls.append(("synchronize event",))

        return Event()

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.inside.append(stream)
        yield
        self.inside.pop()

    def swap(
        self, src_ptrs: Any, dst_ptrs: Any, sizes: Any, is_src_access_order_any: bool = False
    ) -> None:
        tensors = (src_ptrs, dst_ptrs, sizes)
        assert all(t.dtype == torch.int64 and t.device.type == "cpu" for t in tensors)
        assert all(t.is_contiguous() for t in tensors)
        numbers = tuple(t.tolist() for t in tensors)
        self.calls.append(("swap", self.inside[-1], is_src_access_order_any, *numbers))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(torch.cuda, "Stream", found.stream_class)
    monkeypatch.setattr(torch.cuda, "Event", found.event_class)
    monkeypatch.setattr(torch.cuda, "stream", found.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    return found


def cuda_copier(
    recorder: Recorder, swap: Any
) -> tuple[DeviceCopier, list[Any], np.ndarray[Any, Any]]:
    layers = tensors_of("layer", [16, 16], 8, 0, "cpu")
    host = np.zeros(256, np.uint8)
    api = TorchApi(layers, host)
    api._cuda, api._swap = True, swap
    return DeviceCopier([layer_pages(t) for t in layers], api, warn=print), layers, host


@pytest.mark.parametrize(("to_host", "stream"), [(True, "priority 0"), (False, "priority -1")])
def test_cuda_gets_one_batched_call_on_the_stream_of_its_direction(
    recorder: Recorder, to_host: bool, stream: str
) -> None:
    copier, layers, host = cuda_copier(recorder, recorder.swap)
    moves = [PageMove(0, 2, 2, 32), PageMove(1, 0, 1, 128)]
    copy = copier.submit(moves, to_host=to_host)
    assert copy.order_before_compute(), copy.error()
    device_ptrs = [layers[0].data_ptr() + 32, layers[1].data_ptr()]
    host_ptrs = [host.ctypes.data + 32, host.ctypes.data + 128]
    source, target = (device_ptrs, host_ptrs) if to_host else (host_ptrs, device_ptrs)
    assert recorder.calls == [
        ("record", "current of cpu"),
        ("wait", stream),
        ("swap", stream, not to_host, source, target, [32, 16]),
        ("record", stream),
        ("wait", "current of cpu"),
    ]


@pytest.mark.parametrize("to_host", [True, False])
def test_cuda_without_the_batched_call_gets_torch_copies_that_do_not_block(
    recorder: Recorder, to_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    copier, layers, host = cuda_copier(recorder, None)
    seen = []
    plain = torch.Tensor.copy_

    def copy_(target: Any, source: Any, non_blocking: bool = False) -> Any:
        seen.append((non_blocking, recorder.inside[-1], target.is_contiguous()))
        return plain(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    host[:] = np.arange(256)
    copy = copier.submit([PageMove(0, 2, 2, 32), PageMove(1, 0, 1, 128)], to_host=to_host)
    assert copy.done() and copy.error() is None
    assert seen == [(True, f"priority {0 if to_host else -1}", True)] * 2
    if to_host:
        assert host[32:64].sum() == host[128:144].sum() == 0
    else:
        assert layers[1][0].tolist() == list(range(128, 144))


def test_neither_stream_nor_device_is_ever_synchronized(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a device-wide sync")

    monkeypatch.setattr(torch.cuda, "synchronize", forbidden)
    copier, _, _ = cuda_copier(recorder, recorder.swap)
    copy = copier.submit([PageMove(0, 0, 1, 0)], to_host=True)
    assert copy.wait() and copier.close(1)
    assert recorder.calls[-1] == ("synchronize event",)


def test_the_batched_call_of_vllm_has_the_arguments_that_are_given() -> None:
    ops = pytest.importorskip("vllm._custom_ops", reason="vLLM is not installed")
    names = list(inspect.signature(ops.swap_blocks_batch).parameters)
    assert names == ["src_ptrs", "dst_ptrs", "sizes", "is_src_access_order_any"]
    has_op = hasattr(torch.ops._C_cache_ops, "swap_blocks_batch")
    assert (module._find_swap(torch) is not None) == has_op


def test_without_vllm_in_the_process_there_is_no_batched_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(module.sys.modules, "vllm._custom_ops", raising=False)
    assert module._find_swap(torch) is None


def test_threads_may_submit_query_and_close_at_once() -> None:
    rig = TorchRig("cpu", pages=[64] * 4, blocks=50)
    for layer, tensor in enumerate(rig.tensors):
        tensor[:] = torch.arange(50, dtype=torch.uint8)[:, None] + 50 * layer
    wrong: list[Any] = []

    def store(layer: int) -> None:
        for block in range(50):
            move = PageMove(layer, block, 1, 64 * (50 * layer + block))
            copy = rig.copier.submit([move], to_host=True)
            if not copy.wait() or copy.error() is not None:
                wrong.append((move, copy.error()))
            rig.copier.in_flight()

    threads = [threading.Thread(target=store, args=(layer,)) for layer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    expected = np.repeat(np.arange(200, dtype=np.uint8), 64)
    assert np.array_equal(rig.host[: 200 * 64], expected)
    rig.close()


def test_the_arena_can_be_unmapped_after_close() -> None:
    rig = TorchRig("cpu")
    copy = torch_copier(rig.tensors, rig.host, warn=print).submit(
        [PageMove(0, 0, 1, 0)], to_host=True
    )
    assert copy.done()
    rig.close()
