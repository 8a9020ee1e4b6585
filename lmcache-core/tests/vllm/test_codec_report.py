"""``lmc codec report`` on tiny models: its figures against ones that were found in another way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from toy_codecs import Rounding, Toy, holding
from typer.testing import CliRunner

from lmcache_core.cli.app import app
from lmcache_core.codecs.registry import Codecs
from lmcache_core.envelope import stored_bytes
from lmcache_core.integrations.vllm.axes import page_axes
from lmcache_core.integrations.vllm.geometry import Geometry, Group
from lmcache_core.quality import Choice, Plan, Report, make_report, steps_of
from lmcache_core.quality.pages import chunk_layout, pack, unpack
from lmcache_core.quality.plan import read_text
from lmcache_core.sdk import Codec, ConfigError, Encoded, PayloadShape

SMALL = dict(windows=2, context_tokens=512, predicted_tokens=24)
run = CliRunner().invoke


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama of 4 layers that has a tokenizer."""
    from lmcache_core.demo.models import make_tiny

    directory = tmp_path_factory.mktemp("report") / "tiny"
    make_tiny(directory)
    return str(directory)


@pytest.fixture(scope="session")
def shipped(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The report on every installed codec, as JSON, and where its files are."""
    out = tmp_path_factory.mktemp("out")
    sizes = ["--windows", "2", "--context", "512", "--predicted", "24"]
    result = run(app, ["codec", "report", model, *sizes, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), out


class Keeping(Codec):
    """Lossy by its word; its scale is what it multiplies a payload of float32 with."""

    info = Rounding.info

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def encode_into(
        self, source: memoryview, target: memoryview, *, shape: PayloadShape, level: str = ""
    ) -> Encoded:
        half = shape.nbytes // 2
        target[:half] = source[:half]
        self._whole = bytes(source)
        return Encoded(half, 0.0)

    def decode_into(self, source: memoryview, target: memoryview, *, shape: PayloadShape) -> None:
        import numpy as np

        scaled = np.frombuffer(self._whole, np.float32) * np.float32(self._scale)
        target[:] = scaled.tobytes()


def report(model: str, codecs: Codecs, *chosen: Choice, **sizes: Any) -> Report:
    return make_report(Plan(model=model, **{**SMALL, **sizes}), chosen, codecs)


def test_pages_are_those_that_the_adapter_describes() -> None:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(block_size=128, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
    axes = page_axes(spec, "LBHNC")
    if not axes.heads:
        pytest.skip("this processor has other pages, which the adapter does not describe")
    group = Group.of(
        index=0, layers=30, block_size=128, page_bytes=spec.page_size_bytes, window=None,
        chunk_size=256, axes=axes,
    )  # fmt: skip
    adapter = Geometry.of([group], chunk_size=256, hit_step=1, parts=1, workers=1, description=b"")
    ours = chunk_layout(Plan(model="m"), layers=30, heads=3, head_size=64)
    assert ours.shape == adapter.kinds[0].layout.shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("pages", ["cpu", "cuda"])
def test_pages_hold_every_value_once(pages: Any, dtype: Any) -> None:
    import torch

    plan = Plan(model="m", pages=pages, dtype=dtype, chunk_tokens=64, block_tokens=32)
    layout = chunk_layout(plan, layers=2, heads=3, head_size=8)
    kind = getattr(torch, dtype)
    kv = torch.arange(2 * 2 * 64 * 3 * 8).reshape(2, 2, 64, 3, 8).remainder(251).to(kind)
    payload = pack(kv, layout)
    assert unpack(payload, layout).equal(kv)
    # Block 1 of layer 1, head 2: the key of token 5 at index 3, and the value.
    page = torch.frombuffer(payload, dtype=kind).reshape(2, 2, -1)[1, 1]
    if pages == "cpu":
        head = page.reshape(3, 2 * 8 * 32)[2]
        key, value = head[: 8 * 32].reshape(8, 32)[3, 5], head[8 * 32 :].reshape(32, 8)[5, 3]
    else:
        key, value = page.reshape(32, 3, 2, 8)[5, 2, :, 3]
    assert (key, value) == (kv[1, 0, 37, 2, 3], kv[1, 1, 37, 2, 3])


def test_a_report_has_a_row_for_every_codec_and_level(shipped: tuple[dict[str, Any], Path]) -> None:
    found, out = shipped
    rows = {(row["codec"], row["level"]): row for row in found["rows"]}
    assert {("zstd", ""), ("cachegen", "low"), ("cachegen", "high")} <= set(rows)
    assert (found["windows"], found["context_tokens"], found["chunks"]) == (2, 512, 4)
    assert [(each["codec"], each["level"]) for each in found["layers"]] == list(rows)
    for row, errors in zip(found["rows"], found["layers"]):
        assert row["ratio"] > 1 and row["stored_otherwise"] == 0
        assert row["encode_bytes_per_s"] > 0 and row["decode_bytes_per_s"] > 0
        assert len(errors["keys"]) == len(errors["values"]) == 4
        assert max(errors["keys"] + errors["values"]) <= row["max_error"]
    assert json.loads((out / "codecs.json").read_text()) == found
    assert (out / "codecs.png").read_bytes().startswith(b"\x89PNG")


def test_a_lossless_codec_changes_nothing(shipped: tuple[dict[str, Any], Path]) -> None:
    (row,) = (row for row in shipped[0]["rows"] if row["codec"] == "zstd")
    assert row["lossless"] and row["max_error"] == row["perplexity_change"] == row["logit_kl"] == 0
    assert row["greedy_agreement"] == 1


def test_a_higher_level_saves_more_and_loses_more(shipped: tuple[dict[str, Any], Path]) -> None:
    low, medium, high = (row for row in shipped[0]["rows"] if row["codec"] == "cachegen")
    assert 0 < low["max_error"] < medium["max_error"] < high["max_error"]
    assert low["ratio"] < medium["ratio"] < high["ratio"]


def losses(model: str, scale: float) -> tuple[float, float]:
    """Mean negative log probability of the predicted tokens, found without the report's code: in
    one pass over each window, and behind a cache whose keys and values are multiplied."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model)(read_text(None)[0]).input_ids
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    windows = torch.tensor(tokens[: 2 * 537]).reshape(2, 512 + 24 + 1)
    with torch.inference_mode():
        plain = loaded(windows[:, :-1]).logits[:, 512:]
        past = loaded(windows[:, :512], use_cache=True).past_key_values
        for layer in past.layers:
            layer.keys *= scale
            layer.values *= scale
        scaled = loaded(windows[:, 512:-1], past_key_values=past).logits
    loss, right = torch.nn.functional.cross_entropy, windows[:, 513:].flatten()
    return float(loss(plain.flatten(0, 1), right)), float(loss(scaled.flatten(0, 1), right))


def test_perplexity_is_that_of_the_model_without_a_cache(model: str) -> None:
    found = report(model, holding(Toy()), Choice("toy", ""), dtype="float32")
    plain, _ = losses(model, 1.0)
    assert math.log(found.perplexity) == pytest.approx(plain, rel=1e-4)


def test_perplexity_change_is_that_of_a_cache_which_was_changed(model: str) -> None:
    found = report(model, holding(Keeping(0.5)), Choice("rounding", "low"), dtype="float32")
    plain, scaled = losses(model, 0.5)
    assert abs(scaled - plain) > 0.1
    assert math.log1p(found.rows[0].perplexity_change) == pytest.approx(scaled - plain, rel=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1.25, 0.5])
def test_errors_and_ratio_are_of_what_came_back(model: str, scale: float) -> None:
    codecs = holding(Keeping(scale))
    found = report(model, codecs, Choice("rounding", "low"), dtype="float32")
    (row,), (layers,) = found.rows, found.layers
    assert row.max_error == pytest.approx(abs(scale - 1), rel=1e-5)
    assert [*layers.keys, *layers.values] == pytest.approx([abs(scale - 1)] * 8, rel=1e-5)
    raw = 4 * 2 * 256 * 2 * 32 * 4
    assert row.ratio == pytest.approx(raw / stored_bytes(raw // 2))
    assert (row.greedy_agreement == 1, row.logit_kl == 0) == (scale == 1, scale == 1)
    assert row.logit_kl >= 0


def test_chunks_that_a_codec_does_not_take_are_counted(model: str) -> None:
    refusing = Toy()
    refusing.refuses = "nonfinite"
    (row,) = report(model, holding(refusing), Choice("toy", "")).rows
    assert row.stored_otherwise == 4 and row.perplexity_change == 0
    raw = 4 * 2 * 256 * 2 * 32 * 2
    assert row.ratio == pytest.approx(raw / stored_bytes(raw)), "stored as they are"


def test_every_step_is_announced(model: str) -> None:
    steps: list[str] = []
    plan, chosen = Plan(model=model, **SMALL), [Choice("toy", "")]
    make_report(plan, chosen, holding(Toy()), on_step=steps.append)
    assert len(steps) == steps_of(plan, chosen) and steps[-1] == "window 2: toy"


def with_a_tokenizer(make: Callable[[Path], Path], model: str, tmp_path: Path) -> str:
    directory = make(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((Path(model) / name).read_bytes())
    return str(directory)


@pytest.mark.parametrize("sort", ["sliding", "mla"])
def test_models_with_other_caches_are_refused(model: str, sort: str, tmp_path: Path) -> None:
    other = with_a_tokenizer(tiny_models.MODELS[sort], model, tmp_path)
    with pytest.raises(ConfigError, match="not one shape for each of 512 tokens"):
        report(other, holding(Toy()), Choice("toy", ""))


def test_what_does_not_fit_is_said_with_what_does(model: str, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words " * 300)
    few = ["--text", str(short), "--context", "256", "--predicted", "8", "--windows", "90"]
    for arguments, said in (
        ([model, *few], "hint: --windows "),
        ([str(tmp_path)], "hint: give a directory with config.json"),
        ([model, "--codec", "zst"], "did you mean 'zstd'?"),
    ):
        result = run(app, ["codec", "report", *arguments, "--out", str(tmp_path / "out")])
        assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()
