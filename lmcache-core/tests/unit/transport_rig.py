"""Engines of one process that reach each other over a real channel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lmcache_core.chunks import ChunkEngine
from lmcache_core.config import EngineConfig
from lmcache_core.layout import ChunkLayout
from lmcache_core.opening import open_chunks, transport_of
from lmcache_core.transport.push import Push
from lmcache_core.transport.receive import Expected, Missing
from lmcache_core.transport.transport import Transport

LAYOUT = ChunkLayout(chunk_size=16, payload_bytes=100_000, description=b"transport tests")
OURS = {"chunk_size": "16", "parts": "1"}
SLOT_BYTES = 4096 + 102_400


def key(number: int) -> bytes:
    return number.to_bytes(46, "little")


def missing(count: int, start: int = 0) -> list[Missing]:
    return [Missing(key(i), key(i - 1) if i else None, LAYOUT) for i in range(start, start + count)]


class Node:
    """One engine with a transport."""

    def __init__(self, token: Path, identity: Mapping[str, str] = OURS, **config: object) -> None:
        settings = {
            "host_bytes": 8 << 20,
            "channel": "tcp://127.0.0.1:0",
            "channel_token_file": str(token),
            "huge_pages": False,
            "prefault": False,
            **config,
        }
        self.engine: ChunkEngine = open_chunks(
            EngineConfig(**settings),  # type: ignore[arg-type]
            layouts=[LAYOUT],
            identity=lambda: identity,
        )
        found = transport_of(self.engine)
        assert found is not None
        self.transport: Transport = found
        self.empty_bytes = self.engine.host.used_bytes

    def store(self, number: int) -> None:
        """Compute chunk ``number``: its bytes are its number."""
        chunk = self.engine.reserve_key(key(number), key(number - 1) if number else None,
                                        layout=LAYOUT)  # fmt: skip
        assert chunk is not None
        self.engine.host.payload(chunk)[:] = number % 256
        self.engine.commit([chunk])

    def holds(self, number: int) -> bool:
        """Whether chunk ``number`` is served, with its own bytes and no others."""
        chunk = self.engine.host.get(key(number))
        if chunk is None:
            return False
        assert (self.engine.host.payload(chunk) == number % 256).all()
        return True

    def drop_all(self) -> None:
        self.engine.host.drop(self.engine.host.keys())

    def count(self, name: str) -> float:
        return self.engine.metrics.snapshot().get(name, 0)


def soon_s(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def until(ready: Callable[[], object], *nodes: Node, timeout_s: float = 5.0) -> None:
    """Poll ``nodes`` until ``ready``."""
    end_s = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < end_s, "it did not happen"
        for node in nodes:
            node.engine.poll()
        time.sleep(0.0005)


def begun(
    prefiller: Node, decoder: Node, chunks: int, seconds: float = 5.0
) -> tuple[Expected, Push]:
    """A transfer of so many chunks that both sides know."""
    expected = decoder.transport.receiver.expect("t", missing(chunks), deadline_s=soon_s(seconds))
    push = prefiller.transport.pusher.start(
        "t", decoder.transport.address, deadline_s=soon_s(seconds)
    )
    assert expected is not None and push is not None
    return expected, push


@contextmanager
def nodes(token: Path, count: int = 2, **config: object) -> Iterator[list[Node]]:
    """So many engines, which give back every byte in the end."""
    made = [Node(token, **config) for _ in range(count)]  # type: ignore[arg-type]
    try:
        yield made
        until(lambda: not any(node.transport.busy for node in made), *made)
        for node in made:
            node.drop_all()
        until(lambda: all(node.engine.host.used_bytes == node.empty_bytes for node in made), *made)
    finally:
        for node in made:
            node.engine.close()
