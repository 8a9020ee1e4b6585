"""Orders of controllers, carried out on one engine, each once."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from lmcache_core.agent import wire
from lmcache_core.chunks import ChunkEngine
from lmcache_core.clearing import Clearing
from lmcache_core.copying import Copying
from lmcache_core.keys import TAG_BYTES
from lmcache_core.layout import ChunkLayout
from lmcache_core.logs import logger
from lmcache_core.pins import Pinned, Pins, Run
from lmcache_core.recode import Recode
from lmcache_core.sdk import ConfigError, LMCacheError
from lmcache_core.tiers.host import HostChunk
from lmcache_core.tiers.remote import RemoteTier

MAX_REMEMBERED = 4096
"""Orders that have ended, so that they are not carried out again."""
COPY_PIN_S = 600.0
"""How long chunks that were brought to host for a copy stay there at most."""
CLOSE_PEER_S = 1.0


class _Work(Protocol):
    """An order under way."""

    @property
    def done(self) -> bool: ...
    def step(self) -> None: ...
    def cancel(self) -> None: ...
    def progress(self, state: str) -> wire.Progress: ...


class Orders:
    """Owner thread only.

    Clearing starts at once, and waits for no copy: a copy that runs is held up, so that it brings
    back nothing.  Copies and recodings run one after the other.

    Args:
        open_peer: makes a tier that reads another engine's host tier, by its channel's address.
            Raises ConfigError without a channel.
    """

    def __init__(
        self, engine: ChunkEngine, pins: Pins, open_peer: Callable[[str], RemoteTier]
    ) -> None:
        self._engine = engine
        self._pins = pins
        self._open_peer = open_peer
        self._clears: deque[wire.Clear] = deque()
        self._queue: deque[wire.Copy | wire.Recode] = deque()
        self._running: dict[str, _Work] = {}
        self._moving: tuple[str, _Work] | None = None
        self._ended: OrderedDict[str, wire.Progress | None] = OrderedDict()

    @property
    def active(self) -> bool:
        """Whether something is under way."""
        return bool(self._running or self._moving or self._queue or self._clears)

    def accept(self, order: wire.Order) -> None:
        """Carry ``order`` out, unless it is known."""
        waiting = {each.id for each in (*self._queue, *self._clears)}
        moving = self._moving[0] if self._moving else ""
        if order.id in self._ended or order.id in self._running or order.id in waiting:
            return
        if order.id == moving:
            return
        if len(waiting) + len(self._running) >= wire.MAX_ORDERS:
            return  # it comes again
        if isinstance(order, wire.Clear):
            self._clears.append(order)
        elif isinstance(order, (wire.Copy, wire.Recode)):
            self._queue.append(order)
        else:
            self._try(order.id, lambda: self._start_pin(order))

    def cancel(self, ident: str) -> None:
        """End an order early; what it has done stays."""
        for queue in (self._queue, self._clears):
            for order in [order for order in queue if order.id == ident]:
                queue.remove(order)  # type: ignore[arg-type]
                self._end(wire.Progress(id=ident, state="cancelled"))
        work = self._running.get(ident)
        if self._moving and self._moving[0] == ident:
            work = self._moving[1]
        if work is not None and not isinstance(work, _Cancelled):
            work.cancel()
            cancelled = _Cancelled(work)
            if ident in self._running:
                self._running[ident] = cancelled
            else:
                self._moving = (ident, cancelled)

    def recorded(self, idents: Sequence[str]) -> None:
        """Their end need not be told again."""
        for ident in idents:
            if ident in self._ended:
                self._ended[ident] = None

    def step(self) -> None:
        """Go on for a moment."""
        for ident, work in list(self._running.items()):
            self._step(ident, work)
        if self._moving and not self._clears and not self._clearing():
            ident, work = self._moving
            self._step(ident, work)
        if self._clears and (self._moving is None or _at_rest(self._moving[1])):
            while self._clears:
                order = self._clears.popleft()
                self._try(order.id, lambda order=order: self._start_clear(order))  # type: ignore[misc]
        if self._moving is None and self._queue and not self._clearing():
            first = self._queue.popleft()
            self._try(first.id, lambda: self._start_moving(first))

    def progress(self) -> tuple[wire.Progress, ...]:
        """Of everything that runs, and of ends that were not recorded."""
        told = [progress for progress in self._ended.values() if progress is not None]
        told += [work.progress("running") for work in self._running.values()]
        if self._moving:
            told.append(self._moving[1].progress("running"))
        told += [wire.Progress(id=each.id, state="running") for each in self._queue]
        return tuple(told[: wire.MAX_ORDERS])

    def _clearing(self) -> bool:
        return any(isinstance(_inner(work), _ClearWork) for work in self._running.values())

    def _step(self, ident: str, work: _Work) -> None:
        def step() -> None:
            work.step()
            if work.done:
                state = "cancelled" if isinstance(work, _Cancelled) else "done"
                self._end(work.progress(state))

        self._try(ident, step)
        if ident in self._ended:
            self._running.pop(ident, None)
            if self._moving and self._moving[0] == ident:
                self._moving = None

    def _try(self, ident: str, step: Callable[[], None]) -> None:
        """Whatever goes wrong ends the order, and not the engine in whose step it is."""
        try:
            step()
        except (LMCacheError, ValueError) as error:
            hint = getattr(error, "hint", "")
            text = f"{error}" if not hint or hint in f"{error}" else f"{error} ({hint})"
            self._end(wire.Progress(id=ident, state="failed", error=text[: wire.MAX_TEXT]))
        except Exception as error:  # a mistake of ours
            self._engine.metrics.counter("agent.order_broke").inc()
            logger.exception("order %s broke", ident)
            text = f"a mistake in lmcache-core: {error!r}"
            self._end(wire.Progress(id=ident, state="failed", error=text[: wire.MAX_TEXT]))

    def _end(self, progress: wire.Progress) -> None:
        self._ended[progress.id] = progress
        if len(self._ended) > MAX_REMEMBERED:
            self._ended.popitem(last=False)

    def _start_clear(self, order: wire.Clear) -> None:
        keys = None if order.keys is None else wire.split(order.keys)
        clearing = Clearing(self._engine, tiers=order.tiers, tags=order.tags, keys=keys)
        self._pins.end_of(clearing.means, order.tiers)
        self._running[order.id] = _ClearWork(order.id, clearing)

    def _start_pin(self, order: wire.Pin | wire.Unpin) -> None:
        if isinstance(order, wire.Unpin):
            found = self._pins.unpin(order.pin)
            self._end(wire.Progress(id=order.id, state="done", notes={"unpinned": int(found)}))
            return
        until_s = self._engine.now_s() + order.until_s - time.time()
        runs = runs_of(wire.split(order.keys), order.kinds, chained=True)
        one = self._pins.pin(order.pin, runs, tier=order.tier, until_s=until_s)
        total = sum(len(run.keys) for run in runs)
        self._running[order.id] = _PinWork(order.id, self._pins, one, total)

    def _start_moving(self, order: wire.Copy | wire.Recode) -> None:
        work = self._copy(order) if isinstance(order, wire.Copy) else self._recode(order)
        self._moving = (order.id, work)

    def _copy(self, order: wire.Copy) -> _Work:
        runs = runs_of(wire.split(order.keys), order.kinds, chained=order.chained)
        until_s = self._engine.now_s() + COPY_PIN_S

        def landed(chunk: HostChunk) -> None:
            self._pins.hold(order.pin, chunk, until_s=until_s)

        peer = self._open_peer(order.peer) if order.peer else None
        copying = Copying(
            self._engine,
            runs,
            source=order.source if peer is None else peer,
            target=order.target,
            landed=landed if order.pin else None,
        )
        return _CopyWork(order.id, copying, peer)

    def _recode(self, order: wire.Recode) -> _Work:
        if order.keys is not None:
            keys = wire.split(order.keys)
        else:
            tiers = [each for each in self._engine.tiers.readable if each.name == order.tier]
            keys = [key for tier in tiers for tag in order.tags for key in tier.keys_of(tag)]
        recodes = [
            self._engine.recode(
                run.keys, tier=order.tier, layout=run.layout, codec=order.codec, level=order.level
            )
            for run in runs_of(keys, order.kinds, chained=False)
        ]
        return _RecodeWork(order.id, recodes)


def runs_of(keys: Sequence[bytes], kinds: Sequence[wire.ChunkKind], *, chained: bool) -> list[Run]:
    """``keys`` by what they are; a chain also ends where the namespace changes.

    Raises:
        ConfigError: a key of a kind that is not told.
        ContractViolation: a layout that contradicts itself.
    """
    layouts: dict[bytes, ChunkLayout] = {kind.suffix: kind.layout.layout() for kind in kinds}
    found: list[Run] = []

    def sort(key: bytes) -> tuple[bytes, bytes]:
        return key[:TAG_BYTES], key[-6:]

    for (_, suffix), several in itertools.groupby(sorted(keys, key=sort), key=sort):
        if suffix not in layouts:
            raise ConfigError(
                f"no layout for keys that end with {suffix.hex()}", hint="is the model registered?"
            )
        found.append(Run(list(several), layouts[suffix], chained))
    return found


def _at_rest(work: _Work) -> bool:
    inner = _inner(work)
    return not isinstance(inner, _CopyWork) or inner.at_rest


def _inner(work: _Work) -> _Work:
    return work.work if isinstance(work, _Cancelled) else work


class _Cancelled:
    """What is cancelled, until what it has begun has ended."""

    def __init__(self, work: _Work) -> None:
        self.work = work

    @property
    def done(self) -> bool:
        return self.work.done

    def step(self) -> None:
        self.work.step()

    def cancel(self) -> None:
        """It is."""

    def progress(self, state: str) -> wire.Progress:
        return self.work.progress(state)


def _progress(ident: str, state: str, errors: dict[str, int], **fields: object) -> wire.Progress:
    """A failed one is told as failed only when nothing else came of it."""
    if state == "done" and errors and fields.get("settled") == sum(errors.values()):
        state = "failed"
        fields["error"] = ", ".join(f"{count} {reason}" for reason, count in errors.items())
    return wire.Progress(id=ident, state=state, errors=dict(errors), **fields)  # type: ignore[arg-type]


class _ClearWork:
    def __init__(self, ident: str, clearing: Clearing) -> None:
        self._ident = ident
        self._clearing = clearing
        self.step, self.cancel = clearing.step, clearing.cancel

    @property
    def done(self) -> bool:
        return self._clearing.done

    def progress(self, state: str) -> wire.Progress:
        it = self._clearing
        return _progress(self._ident, state, it.failed, total=it.total, settled=it.settled)


class _PinWork:
    def __init__(self, ident: str, pins: Pins, pinned: Pinned, total: int) -> None:
        self._ident = ident
        self._pins = pins
        self._pinned = pinned
        self._total = total

    @property
    def done(self) -> bool:
        return self._pinned.done or not self._pins.lasts(self._pinned)

    def step(self) -> None:
        """`Pins.tick` does."""

    def cancel(self) -> None:
        if self._pins.lasts(self._pinned):
            self._pins.unpin(self._pinned.name)

    def progress(self, state: str) -> wire.Progress:
        one = self._pinned
        if state == "done" and not self._pins.lasts(one):
            error = "it ended, or another pin took its name"
            return wire.Progress(id=self._ident, state="failed", total=self._total, error=error)
        return _progress(
            self._ident,
            state,
            one.missing,
            total=self._total,
            settled=len(one.held) + (sum(one.missing.values()) if one.tier is None else 0),
            nbytes=one.nbytes,
            held=b"".join(one.held) if state == "done" else b"",
        )


class _CopyWork:
    def __init__(self, ident: str, copying: Copying, peer: RemoteTier | None) -> None:
        self._ident = ident
        self._copying = copying
        self._peer = peer
        self.cancel = copying.cancel

    @property
    def done(self) -> bool:
        return self._copying.done

    @property
    def at_rest(self) -> bool:
        """Whether nothing is on its way."""
        return self._copying.at_rest

    def step(self) -> None:
        if self._peer is not None:
            self._peer.tick()
        self._copying.step()
        if self.done and self._peer is not None:
            # Its threads may still wait for the peer: not here.
            close = partial(self._peer.close, CLOSE_PEER_S)
            threading.Thread(target=close, name="lmc-peer-end", daemon=True).start()
            self._peer = None

    def progress(self, state: str) -> wire.Progress:
        it = self._copying
        return _progress(
            self._ident,
            state,
            it.failed,
            total=it.total,
            settled=it.settled,
            nbytes=it.nbytes,
            held=b"".join(it.held) if state != "running" else b"",
        )


class _RecodeWork:
    def __init__(self, ident: str, recodes: Sequence[Recode]) -> None:
        self._ident = ident
        self._recodes = recodes

    @property
    def done(self) -> bool:
        return all(each.done for each in self._recodes)

    def step(self) -> None:
        """The engine's poll does."""

    def cancel(self) -> None:
        for each in self._recodes:
            each.cancel()

    def progress(self, state: str) -> wire.Progress:
        errors: dict[str, int] = {}
        for each in self._recodes:
            for reason, count in each.failed.items():
                errors[reason] = errors.get(reason, 0) + count
        names = ("recoded", "unchanged", "absent", "before_bytes", "after_bytes")
        return _progress(
            self._ident,
            state,
            errors,
            total=sum(each.total for each in self._recodes),
            settled=sum(each.settled for each in self._recodes),
            nbytes=sum(each.before_bytes for each in self._recodes),
            notes={name: sum(getattr(each, name) for each in self._recodes) for name in names},
        )
