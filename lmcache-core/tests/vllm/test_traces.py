"""Spans of a request: lookup, retrieve and store, under the trace that the request came with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Engine, random_tokens
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lmcache_core import tracing

pytestmark = pytest.mark.slow
TRACE = 0x0AF7651916CD43DD8448EB211C80319C
HEADERS = {"traceparent": f"00-{TRACE:032x}-b7ad6b7169203331-01"}
PROMPT = random_tokens(77, 700)


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    before = trace._TRACER_PROVIDER
    trace._TRACER_PROVIDER = provider
    yield exporter
    trace._TRACER_PROVIDER = before


def run(engine: Engine, name: str) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    llm = engine.llm.llm_engine
    llm.add_request(name, {"prompt_token_ids": PROMPT}, params, trace_headers=HEADERS)
    while llm.has_unfinished_requests():
        llm.step()
    engine.settle()


def ours(spans: InMemorySpanExporter) -> dict[str, Any]:
    """vLLM records some of its own."""
    found = spans.get_finished_spans()
    return {span.name: span for span in found if span.name.startswith("lmcache.")}


def test_lookup_store_and_retrieve_are_spans_of_the_request(
    start: Callable[..., Engine], llama: Path, extra: dict[str, Any], spans: InMemorySpanExporter
) -> None:
    engine = start(llama, {**extra, "tracing": True})
    run(engine, "cold")
    cold = ours(spans)
    assert set(cold) == {"lmcache.lookup", "lmcache.store"}
    assert cold["lmcache.lookup"].attributes[tracing.MISS_REASON] == "never_stored"
    assert cold["lmcache.lookup"].attributes[tracing.HIT_TOKENS] == 0
    assert cold["lmcache.store"].attributes[tracing.STORED_TOKENS] > 0
    spans.clear()
    run(engine, "warm")
    warm = ours(spans)
    assert set(warm) == {"lmcache.lookup", "lmcache.retrieve"}
    assert warm["lmcache.lookup"].attributes[tracing.HIT_TOKENS] == 512
    assert warm["lmcache.retrieve"].attributes[tracing.TIERS] == ("host",)
    for span in (*cold.values(), *warm.values()):
        assert span.context.trace_id == TRACE
        assert span.end_time >= span.start_time
        assert str(span.attributes[tracing.REQUEST_ID]).startswith(("cold", "warm"))
