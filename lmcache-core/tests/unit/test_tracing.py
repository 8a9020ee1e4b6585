"""Spans of requests: recorded by OpenTelemetry where there is one, and else nothing at all."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes

from lmcache_core import tracing
from lmcache_core.tracing import Span, Tracer, make_tracer

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}


def provide(monkeypatch: pytest.MonkeyPatch, provider: TracerProvider) -> None:
    monkeypatch.setattr(
        trace, "get_tracer", lambda name, version: provider.get_tracer(name, version)
    )


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    found = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(found))
    provide(monkeypatch, provider)
    yield found
    provider.shutdown()


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    [span] = exporter.get_finished_spans()
    return span


def test_a_span_has_its_name_attributes_and_the_times_given(exporter: InMemorySpanExporter) -> None:
    tracer = make_tracer(True)
    span = tracer.start("lmcache.lookup", attributes={tracing.REQUEST_ID: "r1"}, start_ns=1000)
    assert tracer.enabled and span.recording
    span.set(tracing.HIT_TOKENS, 512)
    span.set(tracing.TIERS, ["host", "disk"])
    assert not exporter.get_finished_spans(), "not before its end"
    span.end(end_ns=5000)
    done = only(exporter)
    assert (done.name, done.start_time, done.end_time) == ("lmcache.lookup", 1000, 5000)
    assert dict(done.attributes or {}) == {
        "gen_ai.request.id": "r1",
        "gen_ai.usage.cache_read.input_tokens": 512,
        "lmcache.tiers": ("host", "disk"),
    }
    assert done.status.status_code is trace.StatusCode.UNSET and done.parent is None
    assert done.instrumentation_scope is not None
    assert done.instrumentation_scope.name == "lmcache_core"


@pytest.mark.parametrize("headers", [HEADERS, {name.title(): v for name, v in HEADERS.items()}])
def test_it_belongs_to_the_trace_of_the_requests_headers(
    exporter: InMemorySpanExporter, headers: dict[str, str]
) -> None:
    make_tracer(True).start("lmcache.lookup", parent={**headers, "cookie": "x"}).end()
    done = only(exporter)
    assert done.context is not None and done.parent is not None
    assert f"{done.context.trace_id:032x}" == TRACE and f"{done.parent.span_id:016x}" == PARENT
    assert done.parent.is_remote and done.context.trace_state.get("vendor") == "1"


@pytest.mark.parametrize(
    "headers",
    [
        None,
        {},
        {"traceparent": ""},
        {"traceparent": "rubbish"},
        {"traceparent": f"00-{'0' * 32}-{PARENT}-01"},
        {"traceparent": f"ff-{TRACE}-{PARENT}-01"},
        {"traceparent": f"00-{TRACE}-{PARENT}-01" + "x" * 100_000},
        {"traceparent": 7},
        {"tracestate": "vendor=1"},
    ],
)
def test_without_a_good_header_a_trace_begins_here(
    exporter: InMemorySpanExporter, headers: dict[str, str] | None
) -> None:
    make_tracer(True).start("lmcache.lookup", parent=headers).end()
    assert only(exporter).parent is None


def test_what_is_current_on_the_thread_is_no_parent(exporter: InMemorySpanExporter) -> None:
    other = TracerProvider().get_tracer("other")
    with other.start_as_current_span("another request's"):
        make_tracer(True).start("lmcache.lookup").end()
    assert only(exporter).parent is None


def test_a_long_tracestate_is_left_out(exporter: InMemorySpanExporter) -> None:
    headers = HEADERS | {"tracestate": "vendor=" + "x" * 1000}
    make_tracer(True).start("lmcache.lookup", parent=headers).end()
    done = only(exporter)
    assert done.context is not None and f"{done.context.trace_id:032x}" == TRACE
    assert not done.context.trace_state


def test_a_span_may_be_the_parent(exporter: InMemorySpanExporter) -> None:
    tracer = make_tracer(True)
    outer = tracer.start("lmcache.retrieve", parent=HEADERS)
    tracer.start("lmcache.retrieve.tier", parent=outer).end()
    outer.end()
    inner_done, outer_done = exporter.get_finished_spans()
    assert inner_done.parent is not None and outer_done.context is not None
    assert inner_done.parent.span_id == outer_done.context.span_id


def test_an_error_is_named_and_marked(exporter: InMemorySpanExporter) -> None:
    make_tracer(True).start("lmcache.retrieve").end("deadline")
    done = only(exporter)
    assert dict(done.attributes or {}) == {"error.type": "deadline"}
    assert done.status.status_code is trace.StatusCode.ERROR
    assert done.status.description == "deadline"


def test_a_block_ends_its_span_with_what_it_raised(exporter: InMemorySpanExporter) -> None:
    tracer = make_tracer(True)
    with tracer.start("good"):
        pass
    with pytest.raises(TimeoutError), tracer.start("bad"):
        raise TimeoutError
    good, bad = exporter.get_finished_spans()
    assert good.status.status_code is trace.StatusCode.UNSET
    assert dict(bad.attributes or {}) == {"error.type": "TimeoutError"}


def test_after_its_end_nothing_changes(
    exporter: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    span = make_tracer(True).start("lmcache.store")
    span.end()
    span.set(tracing.CHUNKS, 3)
    span.end("late")
    done = only(exporter)
    assert not done.attributes and done.status.status_code is trace.StatusCode.UNSET
    assert not span.recording and not caplog.records


def test_it_may_end_on_another_thread(exporter: InMemorySpanExporter) -> None:
    tracer = make_tracer(True)
    spans = [tracer.start("lmcache.store", attributes={"number": n}) for n in range(200)]
    barrier = threading.Barrier(4)

    def end(mine: list[Span]) -> None:
        barrier.wait(10)
        for span in mine:
            span.set("done", True)
            span.end()

    threads = [threading.Thread(target=end, args=(spans[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    found = [dict(span.attributes or {}) for span in exporter.get_finished_spans()]
    assert sorted(one["number"] for one in found) == list(range(200))
    assert all(one["done"] is True for one in found)


def test_what_is_not_sampled_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch, TracerProvider(sampler=ALWAYS_OFF))
    span = make_tracer(True).start("lmcache.lookup", parent=HEADERS)
    span.set(tracing.CHUNKS, 1)
    span.end()
    assert not span.recording


@pytest.mark.parametrize("fails", ["start", "end"])
def test_a_processor_that_raises_harms_tracing_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    class Bad(SpanProcessor):
        def on_start(self, span: object, parent_context: object = None) -> None:
            if fails == "start":
                raise RuntimeError("no room")

        def on_end(self, span: object) -> None:
            raise RuntimeError("no room")

    provider = TracerProvider()
    provider.add_span_processor(Bad())
    provide(monkeypatch, provider)
    tracer = make_tracer(True)
    for _ in range(3):
        tracer.start("lmcache.lookup").end()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"tracing_failed op={fails} why=RuntimeError"], "told, and not each time"


def off(tracer: Tracer) -> bool:
    span = tracer.start("lmcache.lookup", parent=HEADERS, attributes={"a": 1}, start_ns=1)
    span.set("b", 2)
    span.end("deadline", end_ns=2)
    with tracer.start("lmcache.store", parent=span) as block:
        return not (tracer.enabled or span.recording or block.recording)


def test_off_is_nothing_at_all(exporter: InMemorySpanExporter) -> None:
    assert off(make_tracer(False))
    assert not exporter.get_finished_spans()


def test_without_opentelemetry_it_is_off_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "lmcache_core.tracing_otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with caplog.at_level(logging.WARNING):
        assert off(make_tracer(True))
    [record] = caplog.records
    assert "pip install 'lmcache-core[tracing]'" in record.getMessage()


def test_opentelemetry_is_not_imported_while_tracing_is_off() -> None:
    code = (
        "import sys; from lmcache_core.tracing import make_tracer; "
        "make_tracer(False).start('lmcache.lookup').end(); "
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_names_are_those_of_opentelemetrys_conventions() -> None:
    assert tracing.MODEL == gen_ai_attributes.GEN_AI_REQUEST_MODEL
    assert tracing.PROMPT_TOKENS == gen_ai_attributes.GEN_AI_USAGE_INPUT_TOKENS
    assert tracing.HIT_TOKENS == gen_ai_attributes.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS
    assert tracing.STORED_TOKENS == gen_ai_attributes.GEN_AI_USAGE_CACHE_CREATION_INPUT_TOKENS
    assert tracing.ERROR_TYPE == error_attributes.ERROR_TYPE
