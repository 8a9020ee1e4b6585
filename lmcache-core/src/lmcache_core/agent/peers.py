"""`FleetConnector`: the engines that a controller names, as a store that is only read."""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from lmcache_core.agent import wire
from lmcache_core.agent.http import ControllerLink
from lmcache_core.sdk import (
    BackendClosed,
    BackendUnavailable,
    Buffer,
    GetResult,
    Health,
    OpContext,
    RemoteConnector,
    Status,
    Unsupported,
)
from lmcache_core.transport.peers import MAX_CALLS, peer_capabilities

MAX_KNOWN = 65_536
"""Chunks of which it is remembered who has them."""
MAX_PEERS = 256

_decoder = msgspec.msgpack.Decoder(wire.WhereReply)


class FleetConnector(RemoteConnector):
    """Thread-safe.  `exists` asks the controllers, the first one that answers; `get_into` the peer
    that was named.  Values are verified by core, so a wrong word costs a miss.

    Args:
        instance: our own name, which is not to be named.
        controllers: their URLs, asked in this order.
        open_peer: reads one peer's host tier, by its channel's address.

    Raises:
        ConfigError: a URL or ``ca_file`` is wrong.
    """

    def __init__(
        self,
        instance: str,
        controllers: Sequence[str],
        *,
        token: str,
        ca_file: str,
        open_peer: Callable[[str], RemoteConnector],
        max_batch: int,
    ) -> None:
        self.capabilities = peer_capabilities(max_batch)
        self._instance = instance
        self._open_peer = open_peer
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._peers: OrderedDict[str, RemoteConnector] = OrderedDict()
        self._links: queue.LifoQueue[list[ControllerLink]] = queue.LifoQueue()
        for _ in range(MAX_CALLS):
            self._links.put(
                [ControllerLink(url, token=token, ca_file=ca_file) for url in controllers]
            )
        self._closed = False

    def exists(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        reply = self._ask(keys, ctx)
        if reply is None:
            return [Status.TIMED_OUT] * len(keys)
        if len(reply.holder) != len(keys):
            return [Status.FAILED] * len(keys)
        answers = []
        with self._lock:
            for key, number in zip(keys, reply.holder):
                known = 0 <= number < len(reply.peers)
                answers.append(Status.OK if known else Status.MISS)
                if known:
                    self._known[key] = reply.peers[number]
                    self._known.move_to_end(key)
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return answers

    def get_into(
        self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> list[GetResult]:
        self._check()
        results = [GetResult(Status.MISS)] * len(keys)
        by_peer: dict[str, list[int]] = {}
        with self._lock:
            for at, key in enumerate(keys):
                address = self._known.get(key)
                if address is not None:
                    by_peer.setdefault(address, []).append(at)
        for address, several in by_peer.items():
            found = self._peer(address).get_into(
                [keys[at] for at in several], [targets[at] for at in several], ctx
            )
            for at, result in zip(several, found):
                results[at] = result
                if result.status is Status.MISS:
                    with self._lock:
                        self._known.pop(keys[at], None)
        return results

    def put_from(
        self, keys: Sequence[bytes], sources: Sequence[Buffer], ctx: OpContext
    ) -> list[Status]:
        raise Unsupported("peers are only read", backend="fleet", op="put_from")

    def delete(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        """Nothing is deleted: what a peer holds is the peer's.  Who had these is forgotten."""
        with self._lock:
            for key in keys:
                self._known.pop(key, None)
        return [Status.OK] * len(keys)

    def health(self, ctx: OpContext) -> Health:
        answer = self._ask([], ctx)
        return Health(ok=answer is not None, reason="" if answer else "no answer in time")

    def close(self) -> None:
        self._closed = True
        while True:
            try:
                links = self._links.get_nowait()
            except queue.Empty:
                return
            for link in links:
                link.close()

    def _ask(self, keys: Sequence[bytes], ctx: OpContext) -> wire.WhereReply | None:
        """Who has ``keys``; None when nobody said so in time.

        Raises:
            BackendUnavailable: no controller can be reached, or it refuses.
        """
        self._check()
        body = msgspec.msgpack.encode(
            wire.WhereRequest(instance=self._instance, keys=b"".join(keys))
        )
        try:
            links = self._links.get(timeout=max(0.0, ctx.deadline_s - time.monotonic()))
        except queue.Empty:
            return None
        try:
            return self._first_answer(links, body, ctx)
        finally:
            self._links.put(links)
            if self._closed:
                self.close()

    def _first_answer(
        self, links: Sequence[ControllerLink], body: bytes, ctx: OpContext
    ) -> wire.WhereReply | None:
        failed: Exception | None = None
        for link in links:
            left_s = ctx.deadline_s - time.monotonic()
            if left_s <= 0:
                return None
            try:
                answer = link.request(
                    "POST", wire.WHERE_PATH, body, timeout_s=left_s, content_type=wire.CONTENT_TYPE
                )
                if answer.status == 200:
                    return _decoder.decode(answer.body)
                failed = BackendUnavailable(
                    f"the controller at {link.url} refuses: {answer.status}", op="where"
                )
            except (BackendUnavailable, msgspec.MsgspecError) as error:
                failed = error
        raise BackendUnavailable(f"no controller says who has chunks: {failed}", op="where")

    def _peer(self, address: str) -> RemoteConnector:
        with self._lock:
            peer = self._peers.get(address)
            if peer is None:
                peer = self._peers[address] = self._open_peer(address)
                if len(self._peers) > MAX_PEERS:
                    self._peers.popitem(last=False)
            return peer

    def _check(self) -> None:
        if self._closed:
            raise BackendClosed("the fleet was closed", backend="fleet", op="call")
