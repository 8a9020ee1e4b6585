"""A device without hardware: streams that run late and in any order that was not forbidden.

Each call only enqueues.  `step` runs the head of one stream, chosen by a seeded generator with a
taste of its own for some streams, so work is late by much or little.  The only order is the
declared one: that of a stream, and of waits for events.  A dependency that is missing therefore
shows up as wrong bytes for some seed.  As on CUDA:

- an event is complete when all that its stream held at the record has run;
- a wait takes the event's state at the call: one never recorded orders nothing;
- a copy reads and writes piece by piece, other streams in between;
- the source of a load may be read early (any access order), as early as at the call;
- address arrays are read when the copy runs: dropped ones give random bytes;
- copies of memory that is not pinned block the caller.
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmcache_core.transfer.page_moves import CopyBatch, LayerPages

U8 = NDArray[np.uint8]
DEVICE_BASE, HOST_BASE = 1 << 40, 1 << 41


class DeviceError(RuntimeError):
    """What a driver reports."""


@dataclass(eq=False)
class Event:
    recorded: bool = False
    complete: bool = False


@dataclass(eq=False)
class Stream:
    name: str
    taste: float
    queue: deque[Callable[[], None] | Event] = field(default_factory=deque)  # an Event: wait for it
    stalled: bool = False

    @property
    def ready(self) -> bool:
        return bool(self.queue) and (not isinstance(e := self.queue[0], Event) or e.complete)


class FakeDevice:
    """`DeviceApi` over two numpy arrays.

    Attributes:
        calls: name of each call and of its stream, in order.
        failures: call name -> how often it raises from now on; "copy" after its first piece.
    """

    host_address = HOST_BASE

    def __init__(
        self, seed: int, *, device_nbytes: int, host_nbytes: int, pinned: bool = True
    ) -> None:
        self.rng = random.Random(seed)
        self.device: U8 = np.frombuffer(self.rng.randbytes(device_nbytes), np.uint8).copy()
        self.host: U8 = np.frombuffer(self.rng.randbytes(host_nbytes), np.uint8).copy()
        self.host_nbytes, self.pinned = host_nbytes, pinned
        self.streams: list[Stream] = []
        self.current = self.compute = self.add_stream("compute")
        self.calls: list[tuple[str, str]] = []
        self.failures: dict[str, int] = {}

    # What the copier calls.

    def compute_stream(self) -> Stream:
        return self.current

    def new_stream(self, *, high_priority: bool) -> Stream:
        return self.add_stream("loads" if high_priority else "stores")

    def record(self, stream: Stream) -> Event:
        self._called("record", stream)
        event = Event(recorded=True)
        stream.queue.append(lambda: setattr(event, "complete", True))
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        self._called("wait", stream)
        if event.recorded:
            stream.queue.append(event)

    def copy(self, stream: Stream, batch: CopyBatch, *, to_host: bool) -> None:
        alive = [weakref.ref(a) for a in (batch.sources, batch.targets, batch.nbytes)]
        pieces = []
        for index in range(len(batch.nbytes)):
            pieces += self._pieces(batch, index, alive, may_be_early=self.any_order(to_host))
        if self.failures.get("copy", 0):
            stream.queue.extend(pieces[:1])
        self._called("copy", stream)
        stream.queue.extend(pieces)
        while not self.pinned and stream.queue:
            assert self.step(), "waits for ever"

    def query(self, event: Event) -> bool:
        self._called("query", None)
        self.run(self.rng.randrange(4))  # time passes
        return event.complete

    def synchronize(self, event: Event) -> None:
        self._called("synchronize", None)
        while not event.complete:
            assert self.step(), "waits for ever"

    # What a test calls.

    def any_order(self, to_host: bool) -> bool:
        return not to_host

    def add_stream(self, name: str) -> Stream:
        self.streams.append(Stream(name, self.rng.choice((0.02, 0.3, 1.0))))
        return self.streams[-1]

    def launch(self, kernel: Callable[[], None]) -> None:
        """The engine's work: enqueue on the compute stream."""
        self.compute.queue.append(kernel)

    def step(self) -> bool:
        """Run the head of one stream that may run; False when all are empty."""
        ready = [stream for stream in self.streams if stream.ready and not stream.stalled]
        if not ready:
            waits = not any(stream.stalled for stream in self.streams)
            assert not (waits and any(s.queue for s in self.streams)), "streams wait for each other"
            return False
        chosen = self.rng.choices(ready, [stream.taste for stream in ready])[0]
        work = chosen.queue.popleft()
        if not isinstance(work, Event):
            work()
        return True

    def run(self, most: int) -> None:
        for _ in range(most):
            self.step()

    def finish(self) -> None:
        while self.step():
            pass

    def _called(self, name: str, stream: Stream | None) -> None:
        self.calls.append((name, stream.name if stream else ""))
        if self.failures.get(name, 0):
            self.failures[name] -= 1
            raise DeviceError(name)

    def _pieces(
        self, batch: CopyBatch, index: int, alive: list[Any], *, may_be_early: bool
    ) -> list[Callable[[], None]]:
        nbytes = int(batch.nbytes[index])
        source = self.at(int(batch.sources[index]), nbytes)
        target = self.at(int(batch.targets[index]), nbytes)
        if may_be_early and self.rng.random() < 0.5:
            source = source.copy()

        def piece(part: slice) -> Callable[[], None]:
            def run() -> None:
                if all(ref() is not None for ref in alive):
                    target[part] = source[part]
                else:
                    target[part] = np.frombuffer(self.rng.randbytes(len(target[part])), np.uint8)

            return run

        return [piece(slice(0, nbytes // 2)), piece(slice(nbytes // 2, nbytes))]

    def at(self, address: int, nbytes: int) -> U8:
        """The bytes at an address of either memory."""
        memory, base = (
            (self.host, HOST_BASE) if address >= HOST_BASE else (self.device, DEVICE_BASE)
        )
        start = address - base
        assert 0 <= start <= len(memory) - nbytes, "outside of memory"
        return memory[start : start + nbytes]


def layers_of(outer: str, pages: list[int], blocks: int, gap: int) -> tuple[list[LayerPages], int]:
    """Layers of the given page sizes in one of three layouts, and the device bytes they need.

    Args:
        outer: "layer" (one region a layer, ``gap`` bytes between pages), "block" (one region a
            block, its pages of all layers together, ``gap`` bytes between blocks), or "apart"
            (as "layer", each an allocation of its own).
    """
    layers, at = [], DEVICE_BASE
    region = sum(pages) + gap
    for index, page in enumerate(pages):
        if outer == "block":
            layers.append(LayerPages(at, blocks, page, region, 0))
            at += page
        else:
            apart = index if outer == "apart" else 0
            layers.append(LayerPages(at, blocks, page, page + gap, apart))
            at += blocks * (page + gap)
    return layers, blocks * region if outer == "block" else at - DEVICE_BASE
