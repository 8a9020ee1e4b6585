"""What a span costs: while tracing is off, and recorded by OpenTelemetry's SDK.

python benchmarks/tracing.py [--rounds 20]
"""

from __future__ import annotations

import argparse
import time

from lmcache_core.tracing import CHUNKS, HIT_TOKENS, REQUEST_ID, Tracer, make_tracer

SPANS = 10_000
HEADERS = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


def span_ns(tracer: Tracer, rounds: int) -> tuple[float, float]:
    """Median and worst round, of one span with a parent and three attributes."""
    found = []
    for _ in range(rounds):
        start_ns = time.perf_counter_ns()
        for _ in range(SPANS):
            span = tracer.start("lmcache.lookup", parent=HEADERS, attributes={REQUEST_ID: "r"})
            span.set(HIT_TOKENS, 512)
            span.set(CHUNKS, 2)
            span.end()
        found.append((time.perf_counter_ns() - start_ns) / SPANS)
    return sorted(found)[rounds // 2], max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    show("off", make_tracer(False), rounds)
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
    except ImportError:
        print("opentelemetry-sdk is not installed: measured off only")
        return
    show("on, without a provider", make_tracer(True), rounds)
    trace.set_tracer_provider(TracerProvider())
    show("recorded, without an exporter", make_tracer(True), rounds)


def show(name: str, tracer: Tracer, rounds: int) -> None:
    median_ns, worst_ns = span_ns(tracer, rounds)
    print(f"{name:30} {median_ns:7.0f} ns a span, worst round {worst_ns:.0f} ns")


if __name__ == "__main__":
    main()
