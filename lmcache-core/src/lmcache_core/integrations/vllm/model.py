"""What an engine says of its model to controllers, and its tokenizer for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lmcache_core.agent.wire import MAX_TEXT, ChunkKind, Model
from lmcache_core.config import EngineConfig
from lmcache_core.integrations.vllm.geometry import Geometry
from lmcache_core.keys import Namespace
from lmcache_core.layout import LayoutSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def served_model(
    vllm_config: VllmConfig, config: EngineConfig, geometry: Geometry, namespace: Namespace
) -> Model:
    """The model under its first served name."""
    model = vllm_config.model_config
    name = getattr(model, "served_model_name", None) or model.model
    first = name if isinstance(name, str) else name[0]
    return Model(
        name=str(first)[:MAX_TEXT],
        tag=namespace.tag,
        pairs=namespace.pairs,
        chunk_size=geometry.chunk_size,
        hash_algorithm=config.hash_algorithm,
        kinds=tuple(ChunkKind(kind.suffix, LayoutSpec.of(kind.layout)) for kind in geometry.kinds),
    )


def tokenizer_of(vllm_config: VllmConfig) -> Callable[[str], list[int]] | None:
    """Token ids of a text, as a completion's prompt has them; None where the engine has no
    tokenizer.  It is loaded when it is first used."""
    model = vllm_config.model_config
    if model.skip_tokenizer_init:
        return None
    loaded: list[Any] = []

    def tokenize(text: str) -> list[int]:
        if not loaded:
            from vllm.tokenizers.registry import cached_tokenizer_from_config

            loaded.append(cached_tokenizer_from_config(model))
        return [int(token) for token in loaded[0].encode(text)]

    return tokenize
