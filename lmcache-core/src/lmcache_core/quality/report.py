"""The report: runs a model behind what codecs leave of its keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from lmcache_core.codecs.registry import Codecs
from lmcache_core.quality.model import Model, require
from lmcache_core.quality.pages import chunk_layout
from lmcache_core.quality.passage import Passage
from lmcache_core.quality.plan import Choice, Plan, read_text

if TYPE_CHECKING:
    import torch

OnStep = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One codec at one level, against keys and values in ``Plan.dtype`` without a codec.

    Every window is a context, which was encoded and decoded, and the tokens that follow it in
    the text.  The model reads these (teacher forcing) and predicts at each one the next.

    Attributes:
        ratio: bytes of payload for each byte that a tier stores, envelope included.
        perplexity_change: of the text's next tokens, as a fraction: 0.01 is one percent worse.
        perplexity_change_error: one standard error of it, over windows; 0 with one window.
        greedy_agreement: share of positions where the most probable next token is the same.
        logit_kl: mean over positions of KL(raw || codec) of the next token's distribution, nats.
        encode_bytes_per_s, decode_bytes_per_s: bytes of payload, on one thread, checksums
            included; at the median of all chunks.
        max_error: the largest of a layer of keys or values of a chunk: root mean square of the
            differences, divided by that of the values.
        stored_otherwise: chunks that the codec did not take, which were stored lossless or as
            they are.
    """

    codec: str
    level: str
    lossless: bool
    ratio: float
    perplexity_change: float
    perplexity_change_error: float
    greedy_agreement: float
    logit_kl: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float
    max_error: float
    stored_otherwise: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerErrors:
    """``keys`` and ``values``: error of each layer, as in `Row`, over all chunks."""

    codec: str
    level: str
    keys: list[float]
    values: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was measured on what; ``perplexity`` is that without a codec."""

    model: str
    text: str
    dtype: str
    pages: str
    windows: int
    context_tokens: int
    predicted_tokens: int
    chunk_tokens: int
    chunks: int
    perplexity: float
    rows: list[Row]
    layers: list[LayerErrors]


@dataclass(slots=True)
class _Predicted:
    """How well the text was predicted behind one codec.

    Attributes:
        worse: for each window, mean rise of the next token's negative log probability.
        agreement, kl: for each window, means over positions.
    """

    worse: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)

    def add(self, raw: torch.Tensor, found: torch.Tensor, following: torch.Tensor) -> None:
        """One window.

        Args:
            raw, found: log probabilities, float32 ``[tokens, vocabulary]``.
            following: the tokens that really come, int64 ``[tokens]``.
        """
        at = following[:, None]
        self.worse.append(float((raw.gather(1, at) - found.gather(1, at)).mean()))
        self.agreement.append(float((raw.argmax(1) == found.argmax(1)).double().mean()))
        self.kl.append(float((raw.exp() * (raw - found)).sum(1).double().mean()))

    def add_same(self) -> None:
        """One window whose keys and values came back bit for bit."""
        self.worse.append(0.0)
        self.agreement.append(1.0)
        self.kl.append(0.0)


def steps_of(plan: Plan, chosen: Sequence[Choice]) -> int:
    """How often `make_report` calls ``on_step``."""
    return 1 + plan.windows * (1 + len(chosen))


def make_report(
    plan: Plan, chosen: Sequence[Choice], codecs: Codecs, *, on_step: OnStep = lambda text: None
) -> Report:
    """Measure.

    Args:
        chosen: prepared, as from `choices`.
        on_step: called before each step with what it is.

    Raises:
        ConfigError: something is not installed, or model, text and plan do not fit.
    """
    require()
    text, text_name = read_text(plan.text)
    on_step("model")
    model = Model(plan.model)
    tokens = model.windows(text, plan)
    passages: list[Passage] = []
    predicted = [_Predicted() for _ in chosen]
    losses: list[float] = []
    for number, window in enumerate(tokens, 1):
        on_step(f"window {number}: model")
        context, rest = window[: plan.context_tokens], window[plan.context_tokens :]
        kv = _as_stored(model.context(context), plan)
        raw = model.log_probabilities(kv, rest[:-1])
        losses.append(-float(raw.gather(1, rest[1:, None]).mean()))
        if not passages:
            passages = _passages(kv, plan, chosen, codecs)
        for choice, passage, one in zip(chosen, passages, predicted):
            on_step(f"window {number}: {':'.join(filter(None, choice))}")
            found = passage.context(kv)
            if found.equal(kv):
                one.add_same()
            else:
                one.add(raw, model.log_probabilities(found, rest[:-1]), rest[1:])
    return Report(
        model=plan.model,
        text=text_name,
        dtype=plan.dtype,
        pages=plan.pages,
        windows=plan.windows,
        context_tokens=plan.context_tokens,
        predicted_tokens=plan.predicted_tokens,
        chunk_tokens=plan.chunk_tokens,
        chunks=passages[0].chunks,
        perplexity=math.exp(fmean(losses)),
        rows=[_row(passage, one, codecs) for passage, one in zip(passages, predicted)],
        layers=[_layers(passage) for passage in passages],
    )


def _as_stored(kv: torch.Tensor, plan: Plan) -> torch.Tensor:
    import torch

    stored: torch.Tensor = kv.to(getattr(torch, plan.dtype))
    return stored


def _passages(
    kv: torch.Tensor, plan: Plan, chosen: Sequence[Choice], codecs: Codecs
) -> list[Passage]:
    """One for each choice.  Each codec has seen a chunk before, so that none is timed cold."""
    layers, _, _, heads, head_size = kv.shape
    layout = chunk_layout(plan, layers=layers, heads=heads, head_size=head_size)
    for choice in chosen:
        Passage(choice, layout, codecs).chunk(kv[:, :, : plan.chunk_tokens])
    return [Passage(choice, layout, codecs) for choice in chosen]


def _row(passage: Passage, predicted: _Predicted, codecs: Codecs) -> Row:
    worse = predicted.worse
    change = math.expm1(fmean(worse))
    spread = stdev(worse) / math.sqrt(len(worse)) if len(worse) > 1 else 0.0
    return Row(
        codec=passage.choice.codec,
        level=passage.choice.level,
        lossless=codecs.get(passage.choice.codec).info.lossless,
        ratio=passage.ratio,
        perplexity_change=change,
        perplexity_change_error=(1 + change) * spread,
        greedy_agreement=fmean(predicted.agreement),
        logit_kl=fmean(predicted.kl),
        encode_bytes_per_s=passage.bytes_per_s(passage.encode_s),
        decode_bytes_per_s=passage.bytes_per_s(passage.decode_s),
        max_error=passage.max_error,
        stored_otherwise=passage.stored_otherwise,
    )


def _layers(passage: Passage) -> LayerErrors:
    keys, values = passage.layer_errors()
    codec, level = passage.choice
    return LayerErrors(codec=codec, level=level, keys=keys, values=values)
