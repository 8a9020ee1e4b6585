"""Who a chunk belongs to: the namespace of an engine and of each of its requests.

By content, never by name; what can't be identified is not cached (DESIGN: fail closed).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmcache_core.content import FileDigestCache, content_digest
from lmcache_core.keys import Namespace
from lmcache_core.sdk import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

_NAMES_NOT_CONTENT = {"_name_or_path", "name_or_path", "transformers_version"}


def digest_cache() -> FileDigestCache:
    """Digests of weight files, kept between starts under the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return FileDigestCache(Path(base) / "lmcache-core" / "file-digests.json")


def engine_namespace(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Namespace:
    """Everything that the bytes of this engine's pages depend on.

    Raises:
        ConfigError: the weights can't be identified.
    """
    import vllm

    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    load_format = str(getattr(vllm_config.load_config.load_format, "value", None))
    if load_format == "None":
        load_format = str(vllm_config.load_config.load_format)
    if load_format == "dummy":
        raise ConfigError(
            "weights of load_format=dummy have no identity",
            hint="load real weights, or run without the connector",
        )
    groups = kv_cache_config.kv_cache_groups
    return Namespace.of(
        {
            "engine": "vllm",
            "engine_version": vllm.__version__,
            "weights": content_digest(model_directory(vllm_config), cache=digest_cache()),
            "load_format": load_format,
            "model_config": _json(_without_names(model.hf_config.to_dict())),
            "dtype": str(model.dtype),
            "quantization": str(model.quantization),
            "kv_cache_dtype": str(cache.cache_dtype),
            "kv_scales": bool(getattr(cache, "calculate_kv_scales", False)),
            "kv_layout": str(kv_cache_config.kv_cache_layout),
            "kv_spec": [repr(group.kv_cache_spec) for group in groups],
            "layers": [list(group.layer_names) for group in groups],
            "attention": str(getattr(vllm_config.attention_config, "backend", None)),
            "isa": _isa(),
            "tensor_parallel": parallel.tensor_parallel_size,
            "pipeline_parallel": parallel.pipeline_parallel_size,
        }
    )


def model_directory(vllm_config: VllmConfig) -> Path:
    """The local directory of the weights (a hub model's snapshot folder).

    Raises:
        ConfigError: there is none.
    """
    name = vllm_config.model_config.model
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        name, "config.json", revision=vllm_config.model_config.revision or "main"
    )
    if isinstance(found, str):
        return Path(found).parent
    raise ConfigError(
        f"the weights of {name!r} are not in a local directory, so they have no identity",
        hint="give vLLM a local path or a hub model that it has downloaded",
    )


class RequestIdentity:
    """The namespace of each request: tenant salt and LoRA adapter by content.

    Args:
        on_new: told a namespace with its salt and the adapter's digest when it is made.
    """

    def __init__(
        self,
        engine: Namespace,
        *,
        on_new: Callable[[Namespace, str | None, str], None] = lambda namespace, salt, lora: None,
    ) -> None:
        self._engine = engine
        self._on_new = on_new
        self._cache = FileDigestCache(None)
        self._adapters: dict[tuple[int, str], str] = {}
        self._known: dict[tuple[str | None, str], Namespace] = {}

    def of(self, request: Request) -> tuple[Namespace | None, str]:
        """The namespace, or None and the reason why the request is not cached."""
        if getattr(request, "prompt_embeds", None) is not None:
            return None, "prompt_embeds"
        if request.mm_features:
            return None, "multimodal"
        adapter = ""
        if request.lora_request is not None:
            found = self._adapter(request.lora_request)
            if found is None:
                return None, "lora_unidentified"
            adapter = found
        key = (request.cache_salt, adapter)
        if key not in self._known:
            if len(self._known) >= 4096:
                self._known.clear()
            extra: dict[str, Any] = {}
            if request.cache_salt is not None:
                extra["tenant_salt"] = request.cache_salt
            if adapter:
                extra["lora"] = adapter
            self._known[key] = self._engine.derive(**extra) if extra else self._engine
            self._on_new(self._known[key], *key)
        return self._known[key], ""

    def _adapter(self, lora: Any) -> str | None:
        """Digest of the adapter's files; None when they changed under a loaded adapter,
        since nobody can say which of the two the engine computes with."""
        try:
            digest = content_digest(Path(lora.lora_path), cache=self._cache)
        except (ConfigError, OSError):
            return None
        key = (lora.lora_int_id, str(lora.lora_path))
        if getattr(lora, "load_inplace", False):
            self._adapters[key] = digest
        first = self._adapters.setdefault(key, digest)
        return digest if first == digest else None


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_names(v) for k, v in value.items() if k not in _NAMES_NOT_CONTENT}
    if isinstance(value, (list, tuple)):
        return [_without_names(v) for v in value]
    return value


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _isa() -> str:
    """What decides how the attention backend packs a page on this device."""
    if torch.cuda.is_available():
        return f"cuda {torch.cuda.get_device_capability()}"
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return f"cpu {torch.backends.cpu.get_cpu_capability()} amx={amx}"
