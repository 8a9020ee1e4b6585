"""Tiny random models, one of each sort of attention that vLLM pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = dict(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=256,
    num_attention_heads=8,
    max_position_embeddings=8192,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.3,
)


def _save(model: Any, path: Path) -> Path:
    import torch

    model.to(torch.float32).save_pretrained(path)
    return path


def llama(path: Path, *, heads: int = 2, seed: int = 0) -> Path:
    """Full attention with ``heads`` key-value heads out of 8: MHA, GQA or MQA."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **COMMON, num_hidden_layers=3, num_key_value_heads=heads, head_dim=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    return _save(LlamaForCausalLM(config), path)


def mha(path: Path) -> Path:
    return llama(path, heads=8)


def mistral(path: Path) -> Path:
    """Sliding windows of 320 tokens in every layer."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    config = MistralConfig(
        **COMMON, num_hidden_layers=3, num_key_value_heads=2, head_dim=32, sliding_window=320,
        tie_word_embeddings=False,
    )  # fmt: skip
    return _save(MistralForCausalLM(config), path)


def gemma3(path: Path, window: int = 192) -> Path:
    """Three layers with a sliding window, one with full attention."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(2)
    config = Gemma3TextConfig(
        **COMMON, num_hidden_layers=4, num_key_value_heads=2, head_dim=32, sliding_window=window,
        query_pre_attn_scalar=32, layer_types=["sliding_attention"] * 3 + ["full_attention"],
    )  # fmt: skip
    return _save(Gemma3ForCausalLM(config), path)


def deepseek(path: Path) -> Path:
    """Multi-head latent attention: 512 latent and 64 rotary dimensions."""
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(3)
    config = DeepseekV2Config(
        **COMMON, num_hidden_layers=2, num_key_value_heads=8, kv_lora_rank=512, q_lora_rank=None,
        qk_nope_head_dim=32, qk_rope_head_dim=64, v_head_dim=32, first_k_dense_replace=2,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    return _save(DeepseekV2ForCausalLM(config), path)


def mamba(path: Path) -> Path:
    """Recurrent state in place of pages: not served."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(4)
    config = MambaConfig(vocab_size=1024, hidden_size=128, num_hidden_layers=2, pad_token_id=0)
    return _save(MambaForCausalLM(config), path)


MODELS: dict[str, Callable[[Path], Path]] = {
    "gqa": llama,
    "mha": mha,
    "sliding": mistral,
    "hybrid": gemma3,
    "mla": deepseek,
}


def lora(path: Path, *, seed: int) -> Path:
    """An adapter for the demo's tiny Llama."""
    import json

    import torch
    from safetensors.torch import save_file

    torch.manual_seed(100 + seed)
    path.mkdir(parents=True)
    tensors = {}
    for layer in range(4):
        for name, width in (("q_proj", 256), ("v_proj", 64)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, 256) * 0.3
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(width, 8) * 0.3
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"],
        "bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": "llama",
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
