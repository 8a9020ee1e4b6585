"""What a report measures: which codecs, on which text, in which pages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

from lmcache_core.codecs.registry import Codecs
from lmcache_core.sdk import ConfigError

SHIPPED_TEXT = "opticks.txt"
"""Public domain; its source stands in opticks.NOTICE.txt beside it."""
PREPARE_LIMIT_S = 300.0


class Choice(NamedTuple):
    """A codec at one of its levels; "" for a codec without."""

    codec: str
    level: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Of one report.

    Attributes:
        model: directory, or name on the Hub, of a causal language model.
        text: file with the text; None takes the one that ships with the package.
        windows: pieces of the text, from its start, without overlap.
        context_tokens: of a window, whose keys and values are encoded; whole chunks.
        predicted_tokens: that follow in the window, and that the model is asked for.
        chunk_tokens: tokens in a chunk.
        dtype: of keys and values in their pages; the model computes in float32.
        pages: whose pages: of vLLM's CPU backend, or of FlashAttention on CUDA.
        block_tokens: tokens in a page.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    model: str
    text: Path | None = None
    windows: int = 16
    context_tokens: int = 1024
    predicted_tokens: int = 256
    chunk_tokens: int = 256
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    pages: Literal["cpu", "cuda"] = "cpu"
    block_tokens: int = 128

    def __post_init__(self) -> None:
        sizes = (self.windows, self.context_tokens, self.predicted_tokens, self.block_tokens)
        if min(sizes) < 1 or self.chunk_tokens < 1:
            raise ConfigError("windows and tokens are 1 or more", op="report")
        if self.context_tokens % self.chunk_tokens:
            near = max(1, round(self.context_tokens / self.chunk_tokens)) * self.chunk_tokens
            raise ConfigError(
                f"a context of {self.context_tokens} tokens is not whole chunks of "
                f"{self.chunk_tokens}",
                op="report",
                hint=f"--context {near}",
            )
        if self.chunk_tokens % self.block_tokens:
            raise ConfigError(
                f"a chunk of {self.chunk_tokens} tokens is not whole blocks of {self.block_tokens}",
                op="report",
                hint=f"--block {self.chunk_tokens}",
            )

    @property
    def window_tokens(self) -> int:
        """The last predicted token is not an input, but is part of the window."""
        return self.context_tokens + self.predicted_tokens + 1


def read_text(file: Path | None) -> tuple[str, str]:
    """The text, and what it is called.

    Raises:
        ConfigError: the file can't be read.
    """
    if file is None:
        shipped = resources.files("lmcache_core.quality").joinpath(SHIPPED_TEXT)
        return shipped.read_text(encoding="utf-8"), SHIPPED_TEXT
    try:
        return file.read_text(encoding="utf-8"), str(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} can't be read: {error}", op="report", hint="--text takes a UTF-8 file"
        ) from error


def choices(
    wanted: Iterable[str], codecs: Codecs
) -> tuple[list[Choice], list[tuple[str, ConfigError]]]:
    """Codecs and levels to measure, prepared.

    Args:
        wanted: each ``NAME`` (all of its levels) or ``NAME:LEVEL``; none takes every installed
            codec.

    Returns:
        The choices; and what was not asked for by name and can't be used here, with the reason.

    Raises:
        ConfigError: a codec that was asked for, or its level, is not there or can't be used; or
            none can.
    """
    words = list(dict.fromkeys(wanted))
    found: list[Choice] = []
    skipped: list[tuple[str, ConfigError]] = []
    for word in words or codecs.names():
        name, colon, level = word.partition(":")
        try:
            found += _levels(name, level if colon else None, codecs)
        except ConfigError as error:
            if words:
                raise
            skipped.append((name, error))
    if not found:
        raise ConfigError(
            "no codec can be used here", op="report", hint="pip install 'lmcache-core[report]'"
        )
    return list(dict.fromkeys(found)), skipped


def _levels(name: str, level: str | None, codecs: Codecs) -> list[Choice]:
    info = codecs.get(name).info
    if level is not None and level not in info.levels:
        named = ", ".join(filter(None, info.levels))
        raise ConfigError(
            f"codec {name} has no level {level!r}",
            op="report",
            hint=f"its levels are {named}" if named else f"--codec {name}",
        )
    if codecs.ready(name, PREPARE_LIMIT_S) is None:
        raise ConfigError(f"codec {name} was not ready in {PREPARE_LIMIT_S:.0f} s", op="report")
    return [Choice(name, each) for each in info.levels if level is None or each == level]
