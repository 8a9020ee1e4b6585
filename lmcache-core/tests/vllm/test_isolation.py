"""What must not be shared is not shared; what can't be served is refused at start."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from conftest import Engine, cached, random_tokens, save_llama

PROMPT = random_tokens(11, 700)


def fill(start: Any, model: Path, extra: dict[str, Any], **options: Any) -> None:
    engine: Engine = start(model, extra, **options)
    engine.run([PROMPT])
    engine.settle()
    assert engine.run([PROMPT])[0].num_cached_tokens == 512


def test_another_chunk_size_in_the_same_directory_misses(
    llama: Path, start: Any, extra: dict[str, Any]
) -> None:
    fill(start, llama, extra)
    engine: Engine = start(llama, {**extra, "chunk_size": 128})
    assert engine.run([PROMPT])[0].num_cached_tokens == 0


def test_a_changed_weight_file_under_the_same_name_misses(
    tmp_path: Path, start: Any, extra: dict[str, Any]
) -> None:
    model = save_llama(tmp_path / "model", seed=1)
    fill(start, model, extra)
    shutil.rmtree(model)
    save_llama(tmp_path / "model", seed=2)
    engine: Engine = start(model, extra)
    assert engine.run([PROMPT])[0].num_cached_tokens == 0


def test_a_copy_of_the_model_under_another_name_hits(
    tmp_path: Path, llama: Path, start: Any, extra: dict[str, Any]
) -> None:
    fill(start, llama, extra)
    shutil.copytree(llama, tmp_path / "copy")
    engine: Engine = start(tmp_path / "copy", extra)
    assert cached(engine.run([PROMPT])[0]) == {"disk": 512}


def test_tenants_with_different_salts_never_share(
    llama: Path, start: Any, extra: dict[str, Any]
) -> None:
    engine: Engine = start(llama, extra)

    def hits(salt: str | None) -> int:
        prompt: dict[str, Any] = {"prompt_token_ids": PROMPT}
        if salt is not None:
            prompt["cache_salt"] = salt
        found = engine.run([prompt])[0].num_cached_tokens
        engine.settle()
        return int(found)

    assert [hits("a"), hits("b"), hits(None), hits("a"), hits("b")] == [0, 0, 0, 512, 512]


def test_damaged_files_are_misses_and_the_answer_is_right(
    tmp_path: Path, llama: Path, start: Any, extra: dict[str, Any]
) -> None:
    engine: Engine = start(llama, extra)
    reference = engine.tokens([PROMPT])
    engine.settle()
    files = sorted(
        p for p in (tmp_path / "kv").rglob("*") if p.is_file() and p.stat().st_size > 4096
    )
    assert len(files) == 2
    data = bytearray(files[0].read_bytes())
    data[len(data) // 2] ^= 1
    files[0].write_bytes(data)
    files[1].write_bytes(files[1].read_bytes()[:9999])
    again: Engine = start(llama, extra)
    assert again.tokens([PROMPT]) == reference
    counted = again.cache.metrics.snapshot()
    assert counted["disk.corrupt"] >= 1
    again.settle()
    assert cached(again.run([PROMPT])[0]) == {"host": 512}


def test_reset_starts_a_new_epoch(llama: Path, start: Any, extra: dict[str, Any]) -> None:
    engine: Engine = start(llama, extra)
    engine.run([PROMPT])
    engine.settle()
    assert engine.llm.llm_engine.reset_prefix_cache(reset_connector=True)
    assert engine.run([PROMPT])[0].num_cached_tokens == 0
    engine.settle()
    assert engine.run([PROMPT])[0].num_cached_tokens == 512
    assert engine.llm.llm_engine.reset_prefix_cache(reset_connector=True)
    assert engine.run([PROMPT])[0].num_cached_tokens == 0


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize("load", ["sync", "async"])
def test_a_failed_load_follows_the_policy(
    llama: Path,
    start: Any,
    extra: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    load: str,
) -> None:
    from lmcache_core.integrations.vllm.pages import CpuPages

    engine: Engine = start(llama, {**extra, "load": load}, kv_load_failure_policy=policy)
    reference = engine.tokens([PROMPT])
    engine.settle()

    def broken(self: CpuPages, arena: Any, spans: Any) -> None:
        raise OSError("the copy failed")

    with monkeypatch.context() as patch:
        patch.setattr(CpuPages, "onboard", broken)
        output = engine.run([PROMPT])[0]
    if policy == "recompute":
        assert [list(output.outputs[0].token_ids)] == reference
    else:
        assert output.outputs[0].finish_reason == "error"
    engine.settle()
    assert engine.tokens([PROMPT]) == reference


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tiers": [{"url": "nosuch://x"}]}, "nosuch"),
        ({"tiers": [{"url": "file:///x?durabilty=host"}]}, "durability"),
        ({"chunk_sise": 256}, "chunk_size"),
        ({"tiers": [{"host": "1KiB"}]}, "host tier"),
    ],
    ids=["scheme", "option", "key", "host-too-small"],
)
def test_wrong_configuration_is_one_clear_error_at_start(
    llama: Path, start: Any, change: dict[str, Any], words: str
) -> None:
    from lmcache_core.sdk import ConfigError

    with pytest.raises(ConfigError, match=words):
        start(llama, change)


def test_a_directory_that_cannot_be_written_is_an_error_at_start(
    tmp_path: Path, llama: Path, start: Any
) -> None:
    from lmcache_core.sdk import ConfigError

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        start(llama, {"tiers": [{"host": "64MiB"}, {"url": f"file://{tmp_path}/file/kv"}]})


def test_a_model_with_recurrent_state_is_refused_with_the_reason(
    tmp_path: Path, start: Any, extra: dict[str, Any]
) -> None:
    from lmcache_core.sdk import ConfigError

    model = tiny_models.mamba(tmp_path / "mamba")
    with pytest.raises(ConfigError, match="state of the kind MambaSpec"):
        start(model, extra)


def test_chunks_computed_on_top_of_a_failed_load_are_never_stored(
    llama: Path, start: Any, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmcache_core.integrations.vllm.pages import CpuPages

    longer = PROMPT + random_tokens(12, 900)
    plain: Engine = start(llama, max_num_batched_tokens=2048)
    reference = plain.tokens([longer])
    engine: Engine = start(llama, {**extra, "load": "sync"}, max_num_batched_tokens=2048)
    engine.run([PROMPT])
    engine.settle()

    def broken(self: CpuPages, arena: Any, spans: Any) -> None:
        for _, pages in self._pairs(arena, spans):
            pages[:] = 0  # what the pages held before would be right by luck
        raise OSError("the copy failed")

    with monkeypatch.context() as patch:
        patch.setattr(CpuPages, "onboard", broken)
        assert engine.tokens([longer]) == reference
    engine.settle()
    again = engine.run([longer])[0]
    assert [list(again.outputs[0].token_ids)] == reference
    assert again.num_cached_tokens == 1536, "what was recomputed was stored after all"
