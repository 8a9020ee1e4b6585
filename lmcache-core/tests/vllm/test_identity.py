"""Who a request belongs to, and what is refused, by vLLM's own types where they decide."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_core.integrations.vllm.build import refuse_unsupported
from lmcache_core.integrations.vllm.identity import RequestIdentity
from lmcache_core.keys import Namespace
from lmcache_core.sdk import ConfigError


def request(**changes: Any) -> Any:
    plain = {"prompt_embeds": None, "mm_features": [], "lora_request": None, "cache_salt": None}
    return SimpleNamespace(**{**plain, **changes})


def lora(path: Path, *, name: str = "a", number: int = 1, inplace: bool = False) -> Any:
    return SimpleNamespace(
        lora_name=name, lora_int_id=number, lora_path=str(path), load_inplace=inplace
    )


@pytest.fixture
def identity() -> RequestIdentity:
    return RequestIdentity(Namespace.of({"model": "m"}))


def adapter(path: Path, content: bytes) -> Path:
    path.mkdir(exist_ok=True)
    (path / "adapter_model.safetensors").write_bytes(content)
    return path


def test_plain_requests_share_the_engines_namespace(identity: RequestIdentity) -> None:
    first, _ = identity.of(request())
    second, _ = identity.of(request())
    assert first is not None and second is not None
    assert first.tag == second.tag == Namespace.of({"model": "m"}).tag


def test_salts_are_told_apart_also_the_empty_one(identity: RequestIdentity) -> None:
    tags = set()
    for salt in (None, "", "a", "b"):
        namespace, _ = identity.of(request(cache_salt=salt))
        assert namespace is not None
        tags.add(namespace.tag)
    assert len(tags) == 4


def test_adapters_go_by_content_not_by_name(tmp_path: Path, identity: RequestIdentity) -> None:
    one = adapter(tmp_path / "one", b"1" * 100)
    two = adapter(tmp_path / "two", b"2" * 100)
    copy = adapter(tmp_path / "copy", b"1" * 100)
    found = [
        identity.of(request(lora_request=lora(path, name="same", number=i)))[0]
        for i, path in enumerate((one, two, copy))
    ]
    tags = [namespace.tag for namespace in found if namespace is not None]
    assert tags[0] == tags[2] != tags[1]


def test_an_adapter_that_changed_under_a_loaded_one_is_not_cached(
    tmp_path: Path, identity: RequestIdentity
) -> None:
    path = adapter(tmp_path / "one", b"1" * 100)
    first, _ = identity.of(request(lora_request=lora(path)))
    adapter(path, b"2" * 100)
    os.utime(path / "adapter_model.safetensors", (1, 1))
    assert identity.of(request(lora_request=lora(path))) == (None, "lora_unidentified")
    fresh, _ = identity.of(request(lora_request=lora(path, inplace=True)))
    assert first is not None and fresh is not None
    assert first.tag != fresh.tag


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt_embeds": torch.zeros(1)}, "prompt_embeds"),
        ({"mm_features": [object()]}, "multimodal"),
        ({"lora_request": lora(Path("/nonexistent"))}, "lora_unidentified"),
    ],
    ids=["prompt_embeds", "multimodal", "lora"],
)
def test_what_cannot_be_identified_is_not_cached(
    identity: RequestIdentity, changes: dict[str, Any], reason: str
) -> None:
    assert identity.of(request(**changes)) == (None, reason)


def spec(kind: str, **options: Any) -> Any:
    from vllm.v1 import kv_cache_interface

    shape = dict(block_size=128, num_kv_heads=2, head_size=32, dtype=torch.float32)
    return getattr(kv_cache_interface, kind)(**{**shape, **options})


def engine(*specs: Any, **changes: Any) -> tuple[Any, Any]:
    """vLLM's two configurations, as far as they decide what is served."""
    groups = [
        SimpleNamespace(kv_cache_spec=one, is_eagle_group=changes.get("eagle", False))
        for one in specs
    ]
    cacheable = range(changes.get("cacheable", len(groups)))
    parallel = {"world_size": 1, "pipeline_parallel_size": 1, **changes.get("parallel", {})}
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        model_config=SimpleNamespace(is_encoder_decoder=changes.get("encoder", False)),
        kv_transfer_config=SimpleNamespace(kv_role=changes.get("role", "kv_both")),
    )
    return config, SimpleNamespace(kv_cache_groups=groups, prefix_cacheable_group_ids=cacheable)


FULL = "FullAttentionSpec"


@pytest.mark.parametrize(
    "specs",
    [
        [(FULL, {})],
        [("MLAAttentionSpec", {"block_size": 16, "num_kv_heads": 1, "head_size": 576})],
        [("SlidingWindowSpec", {"sliding_window": 128})],
        [(FULL, {}), ("SlidingWindowSpec", {"sliding_window": 128})],
    ],
    ids=["full", "mla", "sliding", "hybrid"],
)
def test_full_sliding_and_latent_attention_are_served(specs: list[Any]) -> None:
    refuse_unsupported(*engine(*(spec(kind, **options) for kind, options in specs)))


def mamba() -> Any:
    from vllm.v1.kv_cache_interface import MambaSpec

    return MambaSpec(block_size=128, shapes=((2, 4),), dtypes=(torch.float32,))


@pytest.mark.parametrize(
    ("specs", "changes", "words"),
    [
        ([], {}, "no KV cache"),
        ([(FULL, {}), None], {}, "MambaSpec"),
        ([("ChunkedLocalAttentionSpec", {"attention_chunk_size": 64})], {}, "ChunkedLocal"),
        ([(FULL, {"attention_chunk_size": 64})], {}, "chunked local attention"),
        ([("CrossAttentionSpec", {})], {}, "CrossAttentionSpec"),
        ([(FULL, {})], {"encoder": True}, "encoder-decoder"),
        ([(FULL, {})], {"eagle": True}, "draft layers"),
        ([(FULL, {}), (FULL, {})], {"cacheable": 1}, "by their prefix"),
        ([(FULL, {})], {"parallel": {"decode_context_parallel_size": 2}}, "decode_context"),
        ([(FULL, {})], {"parallel": {"prefill_context_parallel_size": 2}}, "prefill_context"),
        ([(FULL, {})], {"parallel": {"nnodes_within_dp": 2}}, "2 hosts"),
        (
            [(FULL, {}), ("SlidingWindowSpec", {"sliding_window": 128})],
            {"parallel": {"pipeline_parallel_size": 2}},
            "pipeline stages",
        ),
        ([(FULL, {})], {"role": "kv_router"}, "kv_router"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_served_exactly_is_refused_with_the_reason(
    specs: list[Any], changes: dict[str, Any], words: str
) -> None:
    made = [mamba() if one is None else spec(one[0], **one[1]) for one in specs]
    with pytest.raises(ConfigError, match=words):
        refuse_unsupported(*engine(*made, **changes))
