"""Which axes a page has: what codecs need to know, and core otherwise never looks at.

Known are the pages of the CPU backend's plain kernels and those of FlashAttention on CUDA, as
they are in vLLM 0.32.0.  Any other page is bytes, for lossless codecs alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcache_core.integrations.vllm.geometry import PageAxes
from lmcache_core.logs import logger

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec

_DTYPES = {"torch.bfloat16": "bfloat16", "torch.float16": "float16", "torch.float32": "float32"}


def page_axes(spec: KVCacheSpec, layout: object) -> PageAxes:
    """Of the pages of a group.

    Args:
        layout: ``KVCacheConfig.kv_cache_layout``.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    dtype = _DTYPES.get(str(getattr(spec, "dtype", None)), "")
    plain = dtype and type(spec) in (FullAttentionSpec, SlidingWindowSpec)
    if not plain or not _is_two_arrays(spec):
        return PageAxes(dtype=dtype)
    return _known(spec, dtype, str(getattr(layout, "name", layout)))


def _is_two_arrays(spec: Any) -> bool:
    """Whether a page is keys and values of one shape, and nothing else."""
    value_size = getattr(spec, "head_size_v", None) or spec.head_size
    quantized = str(getattr(spec, "kv_quant_mode", "")).rpartition(".")[2]
    elements = spec.page_size_bytes // spec.dtype.itemsize
    whole = elements == 2 * spec.block_size * spec.num_kv_heads * spec.head_size
    return bool(value_size == spec.head_size and whole and quantized in ("", "NONE", "0", "None"))


def _known(spec: Any, dtype: str, layout: str) -> PageAxes:
    from vllm.platforms import current_platform

    sizes = {"tokens": spec.block_size, "heads": spec.num_kv_heads, "head_size": spec.head_size}
    if current_platform.is_cpu() and _cpu_isa(spec) == "vec" and layout.startswith("LBHNC"):
        return PageAxes.keys_transposed(dtype, **sizes)
    if current_platform.is_cuda() and _cuda_backend(spec) == "FLASH_ATTN":
        return PageAxes.rows(dtype, **sizes, tokens_inside=layout.endswith("HNC"))
    return PageAxes(dtype=dtype)


def _cpu_isa(spec: Any) -> str:
    """Of the attention kernels, which pack keys each in their way."""
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        return str(_get_attn_isa(spec.dtype, spec.block_size, spec.head_size))
    except (ImportError, TypeError) as error:  # a private function, of one version of vLLM
        logger.warning("pages are bytes to codecs: %s", error)
        return ""


def _cuda_backend(spec: Any) -> str:
    try:
        from vllm.v1.attention.selector import get_attn_backend

        return str(get_attn_backend(spec.head_size, spec.dtype, None).get_name())
    except Exception as error:  # what fits this device is vLLM's to say, in its own errors
        logger.warning("pages are bytes to codecs: %s", error)
        return ""
