"""`Agent`: one instance's side of all its controllers."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import metadata
from itertools import islice

from lmcache_core.agent import wire
from lmcache_core.agent.changes import Changes
from lmcache_core.agent.link import Link
from lmcache_core.agent.orders import Orders
from lmcache_core.chunks import ChunkEngine
from lmcache_core.metrics import Metrics
from lmcache_core.pins import Pins
from lmcache_core.tiers.remote import RemoteTier

ACTIVE_TURN_S = 0.005
IDLE_TURN_S = 0.25
STATUS_S = 0.5
CLOSE_LIMIT_S = 2.0
MAX_QUESTIONS = 64
MAX_NAMESPACES = 16_384
MAX_TOP = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What an instance says of itself.

    Attributes:
        name: unique among all that meet at a controller.
        channel: where peers reach it, or "".
        node: incarnation of the node server that holds its cache; asked whenever it is told.
        incarnation: of this process, where it has one already; a node server's engines know it.
        models: what it serves; a node server serves none of its own.
        tokenize: token ids of a text, as a prompt has them; None where there is no tokenizer.  On a
            thread of the agent.
        explain: why chunks of a request missed, None for an unknown request.  Under ``owner``.
        backends: distribution -> version.
        urls: tier's name -> its URL without secrets.
    """

    name: str
    kind: wire.Kind
    channel: str = ""
    node: Callable[[], str] = lambda: ""
    incarnation: str = ""
    models: tuple[wire.Model, ...] = ()
    tokenize: Callable[[str], list[int]] | None = None
    explain: Callable[[str], list[wire.MissRow] | None] | None = None
    backends: dict[str, str] = field(default_factory=dict)
    urls: dict[str, str] = field(default_factory=dict)


class Agent:
    """Tells controllers what is here, and does what they say.

    `tick` belongs to the engine's owner.  An embedded engine may be idle, so that nobody is the
    owner for a while: then the agent's own thread is, by ``turn``.

    Args:
        engine: whose chunks; None where a node server has them.
        controllers: their URLs.
        token: shown to them.
        turn: takes a turn as the owner: polls the engine, which ticks this.
        owner: held by whoever is the owner.
        open_peer: see `Orders`.
        max_pinned_bytes: see `Pins`.
        sync_s: longest time between two syncs.
    """

    busy = False

    def __init__(
        self,
        engine: ChunkEngine | None,
        about: About,
        *,
        controllers: Sequence[str],
        token: str,
        ca_file: str,
        metrics: Metrics,
        turn: Callable[[], None],
        owner: AbstractContextManager[object],
        open_peer: Callable[[str], RemoteTier],
        max_pinned_bytes: int,
        sync_s: float,
    ) -> None:
        self.about = about
        self.incarnation = about.incarnation or secrets.token_hex(8)
        self._engine = engine
        self.metrics = metrics
        self._turn = turn
        self._owner = owner
        self._started_s = time.monotonic()
        self.changes: Changes | None = None
        self._pins: Pins | None = None
        self._orders: Orders | None = None
        if engine is not None:
            self.changes = Changes(engine)
            self._pins = Pins(engine, max_bytes=max_pinned_bytes)
            self._orders = Orders(engine, self._pins, open_peer)
        self._lock = threading.Lock()
        self._inbox: deque[Callable[[], None]] = deque(maxlen=4096)
        self._questions: deque[tuple[Link, wire.Question]] = deque(maxlen=MAX_QUESTIONS)
        self._progress: tuple[wire.Progress, ...] = ()
        self._namespaces: OrderedDict[bytes, wire.NamespaceNote] = OrderedDict()
        self._forgotten_namespaces = 0
        self._top: OrderedDict[bytes, list[int]] = OrderedDict()
        self._limits: tuple[wire.Limit, ...] = ()
        self._tiers: tuple[wire.TierStatus, ...] = ()
        self._looked_s = 0.0
        self._wanted = threading.Event()
        self._closed = False
        self.links = [
            Link(self, url, token=token, ca_file=ca_file, sync_s=sync_s) for url in controllers
        ]
        self._thread = threading.Thread(target=self._drive, name="lmc-agent", daemon=True)

    def start(self) -> None:
        """Begin to talk; once everything that `about` names is there."""
        for link in self.links:
            link.start()
        self._thread.start()

    # Owner's side.

    def tick(self) -> None:
        """Do what was ordered, a moment's worth; owner only.  Called in every step of the engine,
        so that where there is nothing to do it costs nothing."""
        orders, pins, changes = self._orders, self._pins, self.changes
        if self._inbox or (orders is not None and orders.active):
            while self._inbox:
                self._inbox.popleft()()
            if orders is not None:
                orders.step()
                self._progress = orders.progress()
        if pins is not None and pins.any:
            pins.tick()
        now_s = time.monotonic()
        if now_s - self._looked_s >= STATUS_S:
            self._looked_s = now_s
            self._tiers = self._look_at_tiers()
        if changes is not None and changes.asked:
            # Last: whoever has heard what is here knows the tiers too.
            changes.tick()

    def close(self) -> bool:
        """End links and threads; pins end with the process.  False when a thread still runs."""
        if self._closed:
            return True
        self._closed = True
        self._wanted.set()
        for link in self.links:
            link.stop()
        end_s = time.monotonic() + CLOSE_LIMIT_S
        threads = [*(link.thread for link in self.links), self._thread]
        for thread in threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, end_s - time.monotonic()))
        if self._pins is not None:
            self._pins.close()
        return not any(thread.is_alive() for thread in threads)

    def saw_namespace(self, note: wire.NamespaceNote) -> None:
        """An engine uses this namespace; from any thread."""
        with self._lock:
            if note.tag in self._namespaces:
                return
            self._namespaces[note.tag] = note
            if len(self._namespaces) > MAX_NAMESPACES:
                self._namespaces.popitem(last=False)
                self._forgotten_namespaces += 1

    def saved(self, first_key: bytes, tokens: int, chunks: int) -> None:
        """``tokens`` were loaded for a request whose first chunk is ``first_key``."""
        with self._lock:
            row = self._top.setdefault(first_key, [0, 0, 0])
            self._top.move_to_end(first_key)
            row[0], row[1], row[2] = row[0] + tokens, row[1] + 1, max(row[2], chunks)
            if len(self._top) > MAX_TOP:
                self._top.popitem(last=False)

    # Links' side; from their threads.

    def wake(self) -> None:
        """There is something to do."""
        self._wanted.set()

    @property
    def active(self) -> bool:
        """Whether orders are under way."""
        return self._orders is not None and (self._orders.active or bool(self._inbox))

    def take(self, reply: wire.Reply, link: Link) -> None:
        """What a controller says."""
        orders = self._orders
        if orders is not None:
            todo: list[Callable[[], None]] = []
            if reply.recorded:
                todo.append(lambda: orders.recorded(reply.recorded))
            todo += [lambda ident=ident: orders.cancel(ident) for ident in reply.cancel]  # type: ignore[misc]
            todo += [lambda order=order: orders.accept(order) for order in reply.orders]  # type: ignore[misc]
            if reply.limits is not None:
                limits = reply.limits
                todo.append(lambda: self._limit(limits))
            self._inbox.extend(todo)
        self._questions.extend((link, question) for question in reply.questions)
        if reply.orders or reply.questions or reply.cancel or reply.limits is not None:
            self._wanted.set()

    def namespaces(self, start: int) -> tuple[int, tuple[wire.NamespaceNote, ...]]:
        """Those from number ``start`` on, as many as one sync may have, and where to go on.  They
        are numbered as they were seen; the oldest may be forgotten."""
        with self._lock:
            skip = max(0, start - self._forgotten_namespaces)
            notes = tuple(islice(self._namespaces.values(), skip, skip + wire.MAX_NAMESPACES))
            return self._forgotten_namespaces + skip + len(notes), notes

    def status(self) -> wire.Status:
        """Now; of tiers as of a `tick` within the last moment."""
        counters = self.metrics.snapshot()
        with self._lock:
            rows = list(self._top.items())
        most = sorted(rows, key=lambda row: row[1][0], reverse=True)[: wire.MAX_TOP]
        return wire.Status(
            version=_version(),
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._started_s,
            backends=self.about.backends,
            tiers=self._tiers,
            channel=self.about.channel,
            node=self.about.node(),
            counters=dict(list(counters.items())[: wire.MAX_COUNTERS]),
            top=tuple(
                wire.TopPrefix(key, saved, requests, chunks)
                for key, (saved, requests, chunks) in most
            ),
            tokenizer=self.about.tokenize is not None,
        )

    def progress(self) -> tuple[wire.Progress, ...]:
        """Of orders, as of the last `tick`."""
        return self._progress

    # The agent's own thread.

    def _drive(self) -> None:
        while not self._closed:
            while self._questions and not self._closed:
                link, question = self._questions.popleft()
                link.answer(self._answer(question))
            wants = self.changes is not None and any(link.wants_all for link in self.links)
            if self.active or wants:
                self._turn()
                if self._engine is not None:
                    self._engine.runtime.wait(ACTIVE_TURN_S)
            else:
                self._wanted.wait(IDLE_TURN_S)
                self._wanted.clear()
                self._turn()

    def _answer(self, question: wire.Question) -> wire.Answer:
        try:
            if isinstance(question, wire.Tokenize):
                if self.about.tokenize is None:
                    return wire.Answer(id=question.id, error="there is no tokenizer here")
                tokens = self.about.tokenize(question.text)[: wire.MAX_TOKENS]
                return wire.Answer(id=question.id, tokens=tokens, found=True)
            if self.about.explain is None:
                return wire.Answer(id=question.id)
            with self._owner:
                rows = self.about.explain(question.request_id)
            return wire.Answer(id=question.id, misses=rows or [], found=rows is not None)
        except Exception as error:  # an adapter's mistake is told, and ends nothing here
            self.metrics.counter("agent.answer_failed").inc()
            return wire.Answer(id=question.id, error=repr(error)[: wire.MAX_TEXT])

    def _limit(self, limits: tuple[wire.Limit, ...]) -> None:
        """Quotas of tenants; owner only."""
        if self._engine is None or limits == self._limits:
            return
        self._limits = limits

        def of(name: str) -> dict[bytes, int]:
            found: dict[bytes, int] = {}
            for limit in limits:
                if limit.tier in ("*", name):
                    found[limit.tag] = min(limit.nbytes, found.get(limit.tag, limit.nbytes))
            return found

        self._engine.host.limit_shares(of("host"))
        for tier in self._engine.tiers.writable:
            tier.limit_shares(of(tier.name))

    def _look_at_tiers(self) -> tuple[wire.TierStatus, ...]:
        engine = self._engine
        if engine is None:
            return ()
        assert self._pins is not None
        host = engine.host
        found = [
            wire.TierStatus(
                "host",
                "",
                host.used_bytes,
                host.capacity_bytes,
                True,
                pinned_bytes=self._pins.host_bytes,
                shares=_shares(host.shares(wire.MAX_NAMESPACES)),
            )
        ]
        for tier in engine.tiers.readable[: wire.MAX_TIERS - 1]:
            found.append(
                wire.TierStatus(
                    tier.name,
                    self.about.urls.get(tier.name, "")[: wire.MAX_TEXT],
                    tier.used_bytes,
                    tier.config.size_bytes,
                    tier.available,
                    tier.unavailable_reason[: wire.MAX_TEXT],
                    pinned_bytes=tier.pinned_bytes,
                    writable=tier.config.write != "never",
                    shares=_shares(tier.shares(wire.MAX_NAMESPACES)),
                )
            )
        return tuple(found)


def _shares(taken: Sequence[tuple[bytes, int, int]]) -> tuple[wire.Share, ...]:
    return tuple(wire.Share(*each) for each in taken)


def _version() -> str:
    try:
        return metadata.version("lmcache-core")
    except metadata.PackageNotFoundError:
        return "0"
