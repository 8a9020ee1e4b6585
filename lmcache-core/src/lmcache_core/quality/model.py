"""A Hugging Face model that continues behind keys and values that it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcache_core.quality.plan import Plan
from lmcache_core.sdk import ConfigError

if TYPE_CHECKING:
    import torch


def require() -> None:
    """Import what a report needs.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        import matplotlib  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"a report needs {error.name or error}",
            op="report",
            hint="pip install 'lmcache-core[report]'",
        ) from error


class Model:
    """Computes in float32 on the CPU.

    Raises:
        ConfigError: there is no such model, or it can't be loaded.
    """

    def __init__(self, name: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # the report has its own
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
            self._model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"model {name} can't be loaded: {str(error).splitlines()[0]}",
                op="report",
                hint="give a directory with config.json, or a causal model's name on the Hub",
            ) from error

    def windows(self, text: str, plan: Plan) -> torch.Tensor:
        """Token ids, int64 ``[windows, window_tokens]``; each begins as the model's prompts do.

        Raises:
            ConfigError: the text has too few tokens.
        """
        import torch

        start = self._tokenizer("").input_ids[:1]
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        own = plan.window_tokens - len(start)
        if own * plan.windows > len(ids):
            raise ConfigError(
                f"{plan.windows} windows of {own} tokens from a text of {len(ids)}",
                op="report",
                hint=f"--windows {len(ids) // own}" if len(ids) >= own else "a longer --text",
            )
        rows = [start + ids[at * own : (at + 1) * own] for at in range(plan.windows)]
        return torch.tensor(rows)

    def context(self, tokens: torch.Tensor) -> torch.Tensor:
        """Keys and values of a context.

        Args:
            tokens: int64 ``[context_tokens]``.

        Returns:
            float32 ``[layers, 2, context_tokens, heads, head_size]``, keys first.

        Raises:
            ConfigError: not every layer keeps keys and values of one shape for every token.
        """
        import torch

        with torch.inference_mode():
            past = self._model(tokens[None], use_cache=True, logits_to_keep=1).past_key_values
        pairs = [self._pair(layer) for layer in getattr(past, "layers", ())]
        shapes = {tuple(each.shape) for pair in pairs for each in pair}
        if len(shapes) != 1 or next(iter(shapes))[2] != len(tokens):
            raise ConfigError(
                f"layers cache {sorted(shapes) or 'no keys and values'}, "
                f"not one shape for each of {len(tokens)} tokens",
                op="report",
                hint="take a model whose layers all attend to every token before",
            )
        return torch.stack([torch.cat(pair).transpose(1, 2) for pair in pairs])

    @staticmethod
    def _pair(layer: Any) -> tuple[Any, Any]:
        import torch

        none = torch.empty(1, 0, 0, 0)
        keys, values = getattr(layer, "keys", none), getattr(layer, "values", none)
        return (none, none) if keys is None else (keys, values)

    def log_probabilities(self, kv: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Of the token after each of ``tokens``, which follow a context.

        Args:
            kv: the context's, as from `context`, any float dtype.
            tokens: int64 ``[tokens]``.

        Returns:
            float32 ``[tokens, vocabulary]``.
        """
        import torch
        from transformers import DynamicCache

        past = DynamicCache()
        for index, layer in enumerate(kv.to(torch.float32)):
            keys, values = layer.transpose(1, 2)[:, None].contiguous()
            past.update(keys, values, index)
        with torch.inference_mode():
            logits = self._model(tokens[None], past_key_values=past, use_cache=True).logits[0]
            found: torch.Tensor = torch.log_softmax(logits, dim=-1)
        return found
