"""Spans that are recorded: `lmcache_core.tracing` by OpenTelemetry's API.

Whatever a processor or an exporter raises ends here, and is logged: tracing fails alone.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from lmcache_core.logs import EventLog
from lmcache_core.tracing import ERROR_TYPE, NO_SPAN, Span, Tracer, Value

MAX_TRACEPARENT_CHARS = 256
MAX_TRACESTATE_CHARS = 512
MAX_ERROR_CHARS = 256


class RecordedSpan(Span):
    """A span of OpenTelemetry.  Thread-safe, as those are."""

    __slots__ = ("_log", "otel")

    def __init__(self, otel: trace.Span, log: EventLog) -> None:
        self.otel = otel
        self._log = log

    @property
    def recording(self) -> bool:
        return self.otel.is_recording()

    def set(self, name: str, value: Value) -> None:
        try:
            if self.otel.is_recording():
                self.otel.set_attribute(name, value)
        except Exception as error:
            self._log.warn("tracing_failed", op="set", why=type(error).__name__)

    def end(self, error: str = "", *, end_ns: int | None = None) -> None:
        try:
            if not self.otel.is_recording():
                return
            if error:
                self.otel.set_attribute(ERROR_TYPE, error[:MAX_ERROR_CHARS])
                self.otel.set_status(Status(StatusCode.ERROR, error[:MAX_ERROR_CHARS]))
            self.otel.end(end_ns)
        except Exception as failed:
            self._log.warn("tracing_failed", op="end", why=type(failed).__name__)


class RecordingTracer(Tracer):
    """Makes `RecordedSpan` by the provider that the process has set.  Thread-safe."""

    __slots__ = ("_log", "_propagator", "_tracer")

    def __init__(self) -> None:
        version = importlib.metadata.version("lmcache-core")
        self._tracer = trace.get_tracer("lmcache_core", version)
        self._propagator = TraceContextTextMapPropagator()
        self._log = EventLog()

    @property
    def enabled(self) -> bool:
        return True

    def start(
        self,
        name: str,
        *,
        parent: Mapping[str, str] | Span | None = None,
        attributes: Mapping[str, Value] | None = None,
        start_ns: int | None = None,
    ) -> Span:
        try:
            otel = self._tracer.start_span(
                name, self._context(parent), attributes=attributes, start_time=start_ns
            )
        except Exception as error:
            self._log.warn("tracing_failed", op="start", why=type(error).__name__)
            return NO_SPAN
        return RecordedSpan(otel, self._log)

    def _context(self, parent: Mapping[str, str] | Span | None) -> Context:
        """Never what happens to be current on this thread: it belongs to another request."""
        if isinstance(parent, RecordedSpan):
            return set_span_in_context(parent.otel, Context())
        if not parent or isinstance(parent, Span):
            return Context()
        return self._propagator.extract(_trace_headers(parent), Context())


def _trace_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The two that count, in any case of letters; clients send them, so they have a bound."""
    limits = {"traceparent": MAX_TRACEPARENT_CHARS, "tracestate": MAX_TRACESTATE_CHARS}
    found = {name.lower(): value for name, value in headers.items() if len(name) <= 11}
    return {
        name: found[name]
        for name, most in limits.items()
        if isinstance(found.get(name), str) and len(found[name]) <= most
    }
