"""On hardware: real streams, the pinned arena, the rounds of the fake device.

Never run so far: see docs/device.md.
"""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: use `nox -s gpu`")

import device_rounds as rounds  # noqa: E402  torch first: without it this module is skipped
from torch_rig import TorchRig  # noqa: E402

from lmcache_core.transfer.copier import MAX_BATCH  # noqa: E402
from lmcache_core.transfer.device import PageMove  # noqa: E402

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason=f"no CUDA device for torch {torch.__version__}: set GPU_PYTHON to one that has it",
)


@pytest.fixture(params=["batched", "torch copies"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to copy; the batched one where vLLM's CUDA build is installed."""
    from lmcache_core.transfer import device

    if request.param == "batched":
        pytest.importorskip("vllm._custom_ops", reason="vLLM is not installed")
        if device._find_swap(torch) is None:
            pytest.skip("this vLLM has no swap_blocks_batch")
    else:
        monkeypatch.setattr(device, "_find_swap", lambda torch: None)
    return str(request.param)


@pytest.mark.parametrize("outer", ["layer", "block", "apart"])
@pytest.mark.parametrize("seed", range(10))
def test_random_moves_under_a_busy_compute_stream(path: str, outer: str, seed: int) -> None:
    rng = random.Random(seed)
    pages = [rng.choice((512, 4096, 36864, 1000)) for _ in range(4)]
    rig = TorchRig("cuda", outer=outer, pages=pages, blocks=16, gap=rng.choice((0, 512)))
    for _ in range(4):
        for play in (rounds.store_round, rounds.load_round):
            play(rig, rounds.random_moves(rng, rig.layers, rig.host.nbytes), rng)
    rig.close()
    assert not rig.warnings


def test_on_a_compute_stream_that_is_not_the_default(path: str) -> None:
    rng = random.Random(1)
    with torch.cuda.stream(torch.cuda.Stream()):
        rig = TorchRig("cuda")
        for play in (rounds.store_round, rounds.load_round):
            play(rig, rounds.random_moves(rng, rig.layers, rig.host.nbytes), rng)
        rig.close()


def test_submit_and_done_return_while_the_compute_stream_is_busy(path: str) -> None:
    rig = TorchRig("cuda")
    moves = [PageMove(0, 0, 8, 0)]
    assert rig.copier.submit(moves, to_host=True).wait(), "the first one loads modules"
    for _ in range(20):
        rig.busy()
    start_s = time.perf_counter()
    copy = rig.copier.submit(moves, to_host=True)
    assert not copy.done() and copy.error() is None
    assert time.perf_counter() - start_s < 0.05
    assert copy.wait()
    rig.close()


def test_no_sync_of_stream_or_device(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = TorchRig("cuda")
    with monkeypatch.context() as patch:
        for owner in (torch.cuda, torch.cuda.Stream):
            patch.setattr(owner, "synchronize", lambda *a, **k: pytest.fail("a wide sync"))
        torch.cuda.set_sync_debug_mode("error")  # raises at any blocking call of torch
        try:
            copies = [
                rig.copier.submit([PageMove(1, 0, 8, 0)], to_host=to_host)
                for to_host in (True, False)
            ]
            assert copies[1].order_before_compute()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(copy.wait() and copy.error() is None for copy in copies)
    rig.close()


def test_memory_that_is_not_pinned_is_copied_right() -> None:
    rng = random.Random(2)
    rig = TorchRig("cuda", pin=False)
    for play in (rounds.store_round, rounds.load_round):
        play(rig, rounds.random_moves(rng, rig.layers, rig.host.nbytes), rng)
    rig.close()
    assert any("not pinned" in line for line in rig.warnings)


def test_more_copies_than_one_batch_holds(path: str) -> None:
    blocks = 2 * MAX_BATCH + 1
    rig = TorchRig("cuda", pages=[512], blocks=2 * blocks, host_nbytes=blocks * 512)
    moves = [PageMove(0, 2 * i, 1, 512 * i) for i in range(blocks)]
    rng = random.Random(3)
    for play in (rounds.store_round, rounds.load_round):
        play(rig, moves, rng)
    rig.close()


@pytest.mark.parametrize("page_bytes", [4096, 32768, 262144])
@pytest.mark.parametrize("to_host", [True, False])
def test_bandwidth_is_printed(path: str, page_bytes: int, to_host: bool, capsys: Any) -> None:
    nbytes = 256 << 20
    blocks = nbytes // page_bytes
    rig = TorchRig("cuda", pages=[page_bytes], blocks=2 * blocks, host_nbytes=nbytes)
    scattered = [PageMove(0, 2 * i, 1, page_bytes * i) for i in range(blocks)]
    rates = []
    for _ in range(5):
        start_s = time.perf_counter()
        copy = rig.copier.submit(scattered, to_host=to_host)
        assert copy.wait() and copy.error() is None
        rates.append(nbytes / (time.perf_counter() - start_s) / 1e9)
    rig.close()
    name = "device to host" if to_host else "host to device"
    with capsys.disabled():
        print(
            f"\n{name}, {path}, pages of {page_bytes}: {np.median(rates):.1f} GB/s "
            f"({min(rates):.1f} to {max(rates):.1f})"
        )
