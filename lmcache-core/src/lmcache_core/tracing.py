"""OpenTelemetry spans of what the cache does for a request; nothing at all when tracing is off.

A span has no block of its own: it starts in one call of the engine and ends in another, maybe on
another thread.  Where spans go is for who runs the engine to say, by the SDK and its exporter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lmcache_core.logs import logger

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

Value = str | bool | int | float | Sequence[str]
"""Of an attribute."""

# OpenTelemetry's own names, and the one that vLLM gives a request, so that their spans meet ours.
REQUEST_ID = "gen_ai.request.id"
MODEL = "gen_ai.request.model"
PROMPT_TOKENS = "gen_ai.usage.input_tokens"
HIT_TOKENS = "gen_ai.usage.cache_read.input_tokens"
STORED_TOKENS = "gen_ai.usage.cache_creation.input_tokens"
ERROR_TYPE = "error.type"
# What they have no name for.
TIERS = "lmcache.tiers"
CHUNKS = "lmcache.chunks"
SIZE_BYTES = "lmcache.size_bytes"
MISS_REASON = "lmcache.miss.reason"


class Span:
    """One thing that takes time; this one is not recorded.  Thread-safe."""

    __slots__ = ()

    @property
    def recording(self) -> bool:
        """Whether what is set goes anywhere: costly attributes need not be made else."""
        return False

    def set(self, name: str, value: Value) -> None:
        """Set an attribute; after the end it does nothing."""

    def end(self, error: str = "", *, end_ns: int | None = None) -> None:
        """It is over; a second end does nothing.

        Args:
            error: why it failed, one of few short words, such as ``deadline``; "" is success.
            end_ns: Unix time; None is now.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end("" if kind is None else kind.__name__)


class Tracer:
    """Starts spans; this one starts none that are recorded.  Thread-safe."""

    __slots__ = ()

    @property
    def enabled(self) -> bool:
        """Whether spans may be recorded."""
        return False

    def start(
        self,
        name: str,
        *,
        parent: Mapping[str, str] | Span | None = None,
        attributes: Mapping[str, Value] | None = None,
        start_ns: int | None = None,
    ) -> Span:
        """A span that has begun.

        Args:
            name: such as ``lmcache.lookup``.
            parent: a span, or headers of a request, of which ``traceparent`` and ``tracestate``
                (W3C Trace Context) count; without one, or with a broken one, a trace begins here.
            start_ns: Unix time; None is now.
        """
        return NO_SPAN


NO_SPAN = Span()
NO_TRACER = Tracer()


def make_tracer(enabled: bool) -> Tracer:
    """A tracer that records, if ``enabled`` and opentelemetry-api is installed; else one that does
    nothing.  Says once in the log what is missing."""
    if not enabled:
        return NO_TRACER
    try:
        from lmcache_core.tracing_otel import RecordingTracer
    except ImportError:
        logger.warning(
            "tracing is on, and opentelemetry is not installed: no spans.  "
            "pip install 'lmcache-core[tracing]'"
        )
        return NO_TRACER
    return RecordingTracer()
