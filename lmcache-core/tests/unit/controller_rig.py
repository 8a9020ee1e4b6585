"""A controller on real sockets, and instances that do as they are told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
from pd_proxy_rig import LIMIT_S, Clock, served, until

from lmcache_core.agent import wire
from lmcache_core.controller import messages
from lmcache_core.controller.app import build
from lmcache_core.controller.config import ControllerConfig
from lmcache_core.controller.core import Controller
from lmcache_core.controller.state import State
from lmcache_core.controller.state_sqlite import SqliteState
from lmcache_core.keys import ChunkHasher, Namespace, key_suffix
from lmcache_core.layout import LayoutSpec

__all__ = ["LIMIT_S", "Clock", "FakeInstance", "Rig", "model", "rig", "until"]

TOKEN = "operator-token-0123456789"
INSTANCE_TOKEN = "instance-token-0123456789"
CHUNK = 16
GIB = 1 << 30


def model(name: str = "m", *, weights: str = "w", kinds: int = 1) -> wire.Model:
    namespace = Namespace.of({"weights": weights, "name": name})
    layouts = tuple(
        wire.ChunkKind(key_suffix(0, group), LayoutSpec(CHUNK, 1000, b"layout"))
        for group in range(kinds)
    )
    return wire.Model(name, namespace.tag, namespace.pairs, CHUNK, "sha256", layouts)


def namespace_of(served: wire.Model, **extra: object) -> Namespace:
    base = Namespace.from_pairs(served.pairs)
    return base.derive(**extra) if extra else base


def keys_of(served: wire.Model, tokens: list[int], **extra: object) -> list[bytes]:
    """Keys of the first kind; ``extra`` such as ``tenant_salt``."""
    namespace = namespace_of(served, **extra)
    digests = ChunkHasher(namespace, chunk_size=served.chunk_size).digests(tokens)
    return [namespace.tag + digest + served.kinds[0].suffix for digest in digests]


def prompt(chunks: int, start: int = 0) -> list[int]:
    """Tokens of so many chunks."""
    return list(range(start, start + chunks * CHUNK))


def tier(name: str, **fields: Any) -> wire.TierStatus:
    url = "" if name == "host" else f"file:///{name}"
    given = {"used_bytes": 0, "capacity_bytes": GIB, "available": True, **fields}
    return wire.TierStatus(name=name, url=url, **given)


@dataclass
class FakeInstance:
    """Says what a test has it say; holds chunks as sets, by tier.

    ``process`` carries orders out: it gives the progress of one.
    """

    client: httpx.Client
    name: str = "i0"
    incarnation: str = "p0"
    kind: wire.Kind = "embedded"
    tiers: tuple[str, ...] = ("host", "disk")
    models: tuple[wire.Model, ...] = ()
    notes: tuple[wire.NamespaceNote, ...] = ()
    status: dict[str, Any] = field(default_factory=dict)
    held: dict[str, set[bytes]] = field(default_factory=dict)
    orders: list[wire.Order] = field(default_factory=list)
    recorded: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    questions: list[wire.Question] = field(default_factory=list)
    limits: tuple[wire.Limit, ...] = ()
    limits_version: str = ""
    seq: int = 1
    greeted: bool = False

    def __post_init__(self) -> None:
        self.held = self.held or {name: set() for name in self.tiers}

    def says(self) -> wire.Status:
        tiers = tuple(tier(name) for name in self.tiers)
        fields = {"version": "1", "pid": 7, "uptime_s": 1.0, "tiers": tiers, **self.status}
        return wire.Status(**fields)

    def post(self, sync: wire.Sync) -> httpx.Response:
        headers = {"content-type": wire.CONTENT_TYPE}
        return self.client.post(wire.PATH, content=msgspec.msgpack.encode(sync), headers=headers)

    def sync(self, **fields: Any) -> wire.Reply:
        """One sync; the first one says everything."""
        if not self.greeted:
            changes = tuple(
                wire.Change(number, True, wire.join(sorted(self.held[name])))
                for number, name in enumerate(self.tiers)
                if self.held[name]
            )
            everything = {
                "reset": True, "changes": changes, "models": self.models,
                "namespaces": self.notes, "status": self.says(), "seq": 1,
            }  # fmt: skip
            fields = {**everything, **fields}
        given = {
            "version": wire.VERSION, "instance": self.name, "incarnation": self.incarnation,
            "kind": self.kind, "seq": self.seq, "limits_version": self.limits_version, **fields,
        }  # fmt: skip
        answer = self.post(wire.Sync(**given))
        assert answer.status_code == 200, answer.text
        reply = msgspec.msgpack.decode(answer.content, type=wire.Reply)
        self.greeted = True
        self.seq = given["seq"] + len(given.get("changes", ()))
        self.orders += reply.orders
        self.recorded += reply.recorded
        self.cancelled += reply.cancel
        self.questions += reply.questions
        if reply.limits is not None:
            self.limits, self.limits_version = reply.limits, reply.limits_version
        return reply

    def stores(self, tier: str, keys: list[bytes], present: bool = True) -> wire.Reply:
        """Tell of chunks that came, or went."""
        (self.held[tier].update if present else self.held[tier].difference_update)(keys)
        change = wire.Change(self.tiers.index(tier), present, wire.join(keys))
        return self.sync(changes=(change,))

    def restarts(self, **fields: Any) -> None:
        """Another process has its name from now on."""
        self.incarnation += "x"
        self.greeted, self.seq = False, 1
        self.orders.clear()
        for name, value in fields.items():
            setattr(self, name, value)

    def take(self, wait_s: float = 2.0) -> list[wire.Order]:
        """Orders that it is owed, waited for."""
        if not self.orders:
            self.sync(wait_s=wait_s)
        taken, self.orders = self.orders, []
        return taken

    def ends(self, order: wire.Order, state: str = "done", **fields: Any) -> wire.Reply:
        """Tell the end of an order."""
        return self.sync(progress=(wire.Progress(id=order.id, state=state, **fields),))

    def obey(self) -> list[wire.Order]:
        """Carry out all that it is owed now, on its sets; what that was."""
        taken = self.take(0.0)
        for order in taken:
            held, changes, total = self._carried_out(order)
            self.sync(
                changes=changes,
                progress=(
                    wire.Progress(
                        id=order.id, state="done", held=wire.join(held), total=total, settled=total
                    ),
                ),
            )
        return taken

    def _carried_out(self, order: wire.Order) -> tuple[list[bytes], tuple[wire.Change, ...], int]:
        changes: list[wire.Change] = []
        if isinstance(order, wire.Clear):
            total = 0
            keys_meant = None if order.keys is None else set(wire.split(order.keys))
            for number, name in enumerate(self.tiers):
                if order.tiers and name not in order.tiers:
                    continue
                gone = {
                    key
                    for key in self.held[name]
                    if (keys_meant is None or key in keys_meant)
                    and (order.tags is None or key[:8] in order.tags)
                }
                self.held[name] -= gone
                total += len(gone)
                if gone:
                    changes.append(wire.Change(number, False, wire.join(sorted(gone))))
            return [], tuple(changes), total
        if isinstance(order, wire.Copy):
            keys = wire.split(order.keys)
            found = keys if order.peer else [k for k in keys if k in self.held[order.source]]
            new = [key for key in found if key not in self.held[order.target]]
            self.held[order.target].update(new)
            if new:
                number = self.tiers.index(order.target)
                changes.append(wire.Change(number, True, wire.join(new)))
            return found, tuple(changes), len(keys)
        if isinstance(order, wire.Pin):
            keys = [k for k in wire.split(order.keys) if k in self.held[order.tier]]
            return keys, (), len(keys)
        return [], (), 0


@dataclass
class Rig:
    """A controller that runs, and clients of it."""

    url: str
    client: httpx.Client
    controller: Controller
    clock: Clock
    _made: contextlib.ExitStack

    def instance(self, name: str = "i0", *, token: str = INSTANCE_TOKEN, **fields: Any) -> Any:
        """An instance that has not spoken yet."""
        return FakeInstance(self.made_client(token), name=name, **fields)

    def made_client(self, token: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {token}"}
        client = httpx.Client(base_url=self.url, trust_env=False, timeout=LIMIT_S, headers=headers)
        return self._made.enter_context(client)

    def get(self, path: str, as_type: Any = None, **query: Any) -> Any:
        answer = self.client.get(path, params=query)
        assert answer.status_code == 200, answer.text
        return msgspec.json.decode(answer.content, type=as_type) if as_type else answer.json()

    def post(self, path: str, body: dict[str, Any], *, key: str = "", status: int = 0) -> Any:
        headers = {"idempotency-key": key} if key else {}
        answer = self.client.post(path, json=body, headers=headers)
        if status:
            assert answer.status_code == status, answer.text
        else:
            assert answer.status_code < 300, answer.text
        return answer.json()

    def job(self, id: str, wait_s: float = 0.0) -> messages.Job:
        found: messages.Job = self.get(f"/v1/jobs/{id}", messages.Job, wait_s=wait_s)
        return found


@contextlib.contextmanager
def rig(
    state: State | None = None,
    *,
    clock: Clock | None = None,
    **limits: Any,
) -> Iterator[Rig]:
    """A controller with ``limits``; its clock stands still until a test turns it."""
    given = {"instance_token": INSTANCE_TOKEN, "tick_s": 0.02, "refresh_s": 0.02, **limits}
    config = ControllerConfig(token=TOKEN, **given)
    clock = clock or Clock()
    made: dict[str, Controller] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        # Made on the loop that it belongs to.
        if "app" not in made:
            known = Controller(
                config, state or SqliteState(":memory:", wall_s=clock), now_s=clock, wall_s=clock
            )
            made["controller"], made["app"] = known, build(config, known)  # type: ignore[assignment]
        await made["app"](scope, receive, send)  # type: ignore[operator]

    with contextlib.ExitStack() as stack:
        url = stack.enter_context(served(app, lifespan="on"))
        found = Rig(url, None, made["controller"], clock, stack)  # type: ignore[arg-type]
        found.client = found.made_client(TOKEN)
        yield found


class Worker(FakeInstance):
    """Obeys as a real one: an order is carried out once by a process, and its end is told until it
    was recorded.  ``run`` is what it was told and did, by id."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.run: dict[str, wire.Order] = {}
        self.ended: dict[str, wire.Progress] = {}

    def step(self) -> None:
        """One sync, and all that follows from it."""
        reply = self.sync(progress=tuple(self.ended.values()))
        self.orders.clear()
        if reply.resync:
            self.greeted, self.seq = False, 1
        for id in reply.recorded:
            self.ended.pop(id, None)
        for order in reply.orders:
            if order.id in self.run:
                continue
            self.run[order.id] = order
            held, _, total = self._carried_out(order)
            self.greeted = False  # all that it has now comes with the next one
            self.ended[order.id] = wire.Progress(
                id=order.id, state="done", held=wire.join(held), total=total, settled=total
            )

    def meets(self, client: httpx.Client) -> None:
        """Another controller, or the same after its end."""
        self.client, self.greeted, self.seq = client, False, 1

    def restarts(self, **fields: Any) -> None:
        super().restarts(**fields)
        self.run.clear()
        self.ended.clear()


def workers(made: Rig, *known: Worker, served: wire.Model, keys: list[bytes]) -> list[Worker]:
    """Giver, which has ``keys`` on disk, and taker, which meet this controller."""
    if not known:
        return [
            Worker(
                made.made_client(INSTANCE_TOKEN), name=name, models=(served,),
                status={"channel": f"tcp://{name}:1"},
                held={"host": set(), "disk": set(keys) if name == "giver" else set()},
            )
            for name in ("giver", "taker")
        ]  # fmt: skip
    for worker in known:
        worker.meets(made.made_client(INSTANCE_TOKEN))
    return list(known)
