"""Codecs on a live engine: the axes of its pages are what codecs are told, and what comes back
through a tier that encodes serves the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_models
from conftest import Engine, cached, random_tokens

from lmcache_core.integrations.vllm import build
from lmcache_core.integrations.vllm.geometry import PageAxes
from lmcache_core.sdk import KVTensor

PROMPT = random_tokens(71, 600)
Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="session", params=["gqa", "mha", "sliding", "hybrid"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.MODELS[request.param](tmp_path_factory.mktemp(request.param) / "model")


def read(payload: npt.NDArray[np.uint8], tensor: KVTensor, dtype: str) -> Floats:
    """``tensor`` as [layers, tokens, heads, head_size]."""
    size = 4 if dtype == "float32" else 2
    kind = np.uint32 if size == 4 else np.uint16
    flat = payload.view(kind)[tensor.offset_bytes // size :]
    view = np.lib.stride_tricks.as_strided(flat, tensor.shape, tensor.strides_bytes)
    layers, blocks, tokens, heads, head_size = tensor.shape
    bits = view.reshape(layers, blocks * tokens, heads, head_size).astype(np.uint32)
    return (bits if size == 4 else bits << 16).view(np.float32)


def expected(model: Path, tokens: list[int]) -> list[tuple[Floats, Floats]]:
    """Keys and values of each layer as [tokens, heads, head_size], by another implementation."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        past = loaded(torch.tensor([tokens]), use_cache=True).past_key_values
    found = []
    for layer in past.layers:
        keys, values = (x[0].transpose(0, 1).numpy() for x in (layer.keys, layer.values))
        found.append((keys, values))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_axes_of_a_page_are_what_codecs_are_told(
    model: Path, start: Any, extra: dict[str, Any], dtype: str
) -> None:
    engine: Engine = start(model, extra, dtype=dtype)
    engine.run([PROMPT[:300]], max_tokens=1)
    engine.settle()
    host, geometry = engine.cache.host, engine.connector.scheduler._geometry
    wanted = expected(model, PROMPT[:256])
    seen = 0
    for kind in geometry.kinds:
        shape = kind.layout.shape
        assert shape.dtype == dtype
        assert len(shape.tensors) == 2 * len(kind.groups)
        chunk = next(c for c in host._chunks.values() if c.layout is kind.layout)
        for group, tensor in zip([g for g in kind.groups for _ in "kv"], shape.tensors):
            got = read(host.payload(chunk), tensor, dtype)
            names = engine.core.scheduler.kv_cache_config.kv_cache_groups[group.index].layer_names
            for index, name in enumerate(names):
                reference = wanted[int(name.split(".")[2])][tensor.role == "value"]
                tail = reference[-got.shape[1] :]
                if tail.shape[0] < got.shape[1]:
                    continue
                error = float(np.sqrt(np.mean((got[index] - tail) ** 2) / np.mean(tail**2)))
                assert error < (1e-3 if dtype == "float32" else 0.15), (name, tensor.role)
                seen += 1
    assert seen >= 2


@pytest.mark.parametrize("codec", ["zstd", "cachegen"])
def test_a_new_engine_is_served_from_a_tier_that_encodes(
    llama: Path, start: Any, extra: dict[str, Any], codec: str
) -> None:
    reference = start(llama).run([PROMPT], max_tokens=8, logprobs=1)[0]
    extra["tiers"][1] |= {"codec": codec, "deadline_s": 60.0}
    engine: Engine = start(llama, extra)
    engine.run([PROMPT], max_tokens=1)
    engine.settle()
    assert engine.cache.metrics.snapshot()[f"disk.encoded.{codec}"] == 2
    again: Engine = start(llama, extra | {"lookup_deadline_s": 60.0})
    output = again.run([PROMPT], max_tokens=8, logprobs=1)[0]
    assert cached(output) == {"disk": 512}
    assert again.cache.metrics.snapshot()[f"disk.decoded.{codec}"] == 2
    if codec == "zstd":
        assert list(output.outputs[0].token_ids) == list(reference.outputs[0].token_ids)
        return
    # A random model has no sensible text to compare: its first token is nearly as probable.
    probable = [next(iter(o.outputs[0].logprobs[0].values())).logprob for o in (output, reference)]
    assert probable[0] == pytest.approx(probable[1], abs=0.5)


def test_pages_of_unknown_axes_are_stored_lossless(
    llama: Path, start: Any, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = start(llama).tokens([PROMPT])
    monkeypatch.setattr(build, "page_axes", lambda spec, layout: PageAxes(dtype="float32"))
    extra["tiers"][1] |= {"codec": "cachegen", "deadline_s": 60.0}
    engine: Engine = start(llama, extra)
    assert engine.tokens([PROMPT]) == reference
    engine.settle()
    counts = engine.cache.metrics.snapshot()
    assert counts["disk.codec_refused.axes.cachegen"] == 2
    assert counts["disk.encoded.zstd"] + counts.get("disk.encoded.as_is", 0) == 2
    again: Engine = start(llama, extra)
    assert again.tokens([PROMPT]) == reference
