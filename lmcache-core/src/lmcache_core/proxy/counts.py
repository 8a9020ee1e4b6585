"""What the proxy counts, and how Prometheus reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from lmcache_core.proxy.pool import State

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "lmcache_core:pd_proxy_"


class Counts:
    """Counters of one proxy.  Not thread-safe: they belong to one event loop.

    Attributes:
        requests: by outcome: ``completed``; ``engine_error`` (relayed, 400 or above); ``broken``
            (the decoder was lost after its first byte); ``no_decoder``; ``client_left``;
            ``refused``; ``busy``; ``internal_error``, which is a bug.
        alone: requests that a decoder got without a transfer, by reason.
        prefills: by outcome: ``done``; ``failed``; ``refused`` (4xx); ``late``; ``cancelled``.
        decode_retries: requests that went to a second decoder.
        in_flight: requests now, a gauge.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.alone: Counter[str] = Counter()
        self.prefills: Counter[str] = Counter()
        self.decode_retries = 0
        self.in_flight = 0

    def text(self, engines: Mapping[str, Iterable[State]]) -> str:
        """Everything in Prometheus' text format.

        Args:
            engines: states by ``prefill`` and ``decode``.
        """
        states = [(kind, state) for kind, found in engines.items() for state in found]
        lines = [
            *_family("requests_total", "counter", "Requests by how they ended",
                     _by("outcome", self.requests)),
            *_family("alone_total", "counter", "Requests sent to a decoder without a transfer",
                     _by("reason", self.alone)),
            *_family("prefills_total", "counter", "Requests to prefillers by how they ended",
                     _by("outcome", self.prefills)),
            *_family("decode_retries_total", "counter", "Requests that went to a second decoder",
                     {"": self.decode_retries}),
            *_family("in_flight", "gauge", "Requests now", {"": self.in_flight}),
            *_family("engine_in_flight", "gauge", "Requests now at an engine",
                     {_labels(kind, state): state.in_flight for kind, state in states}),
            *_family("engine_healthy", "gauge", "1 when an engine is given requests",
                     {_labels(kind, state): int(state.healthy) for kind, state in states}),
        ]  # fmt: skip
        return "\n".join(lines) + "\n"


def _by(label: str, counter: Counter[str]) -> dict[str, int]:
    return {f'{{{label}="{name}"}}': count for name, count in sorted(counter.items())}


def _labels(kind: str, state: State) -> str:
    url = state.engine.url.replace("\\", "\\\\").replace('"', '\\"')
    return f'{{kind="{kind}",url="{url}"}}'


def _family(name: str, kind: str, text: str, values: Mapping[str, int]) -> list[str]:
    samples = [f"{_PREFIX}{name}{labels} {value}" for labels, value in values.items()]
    return [f"# HELP {_PREFIX}{name} {text}", f"# TYPE {_PREFIX}{name} {kind}", *samples]
