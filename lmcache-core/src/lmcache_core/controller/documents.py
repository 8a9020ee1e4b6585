"""State as the event loop sees it: off its thread, with a memory of the small documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import msgspec

from lmcache_core.controller.problem import Refusal
from lmcache_core.controller.records import WATCHED
from lmcache_core.controller.state import Document, State
from lmcache_core.logs import EventLog
from lmcache_core.sdk import LMCacheError

T = TypeVar("T")
Listener = Callable[[str, str], None]
_PAGE = 1024
_TRIES = 16
_REST_S = 1.0
"""How long a failed store is left alone: whoever asks in between is told at once."""


class StoreDown(Refusal):
    """The store can't be reached; what needs it must wait."""

    def __init__(self, error: LMCacheError) -> None:
        super().__init__(503, "store_unavailable", error.message, hint=error.hint, retry_after_s=2)


@dataclass(slots=True)
class _Held:
    value: Any
    version: int
    expires_s: float | None


class Documents:
    """Documents of `WATCHED` kinds in memory, as they were when `refresh` or we last looked, and
    all others as bytes.  Belongs to one event loop.

    Every method that is async raises `StoreDown`.

    Args:
        now_s: monotonic; ``wall_s``: Unix time.
        limit: calls of the store at the same time.
    """

    def __init__(
        self,
        state: State,
        *,
        now_s: Callable[[], float],
        wall_s: Callable[[], float],
        limit: int = 8,
    ) -> None:
        self.state = state
        self.errors: Counter[str] = Counter()
        self.down: str = ""
        self._now_s, self._wall_s = now_s, wall_s
        self._limiter = anyio.CapacityLimiter(limit)
        self._log = EventLog(now_s)
        self._retry_at_s = 0.0
        self._failure: LMCacheError | None = None
        self._held: dict[str, dict[str, _Held]] = {kind: {} for kind in WATCHED}
        self._listeners: list[Listener] = []
        self._on_emptied: list[Callable[[], None]] = []
        self._epoch = ""
        self._seen = 0

    def listen(self, listener: Listener) -> None:
        """Have ``listener`` told kind and id of each watched document that changed or went."""
        self._listeners.append(listener)

    def on_emptied(self, call: Callable[[], None]) -> None:
        """Have ``call`` made when somebody emptied the store, before its documents are forgotten
        here."""
        self._on_emptied.append(call)

    def all(self, kind: str) -> dict[str, Any]:
        """Every document of a watched kind that has not expired, by id."""
        now_s = self._wall_s()
        return {
            id: held.value
            for id, held in self._held[kind].items()
            if held.expires_s is None or held.expires_s > now_s
        }

    def number(self, kind: str) -> int:
        """Documents of a watched kind in memory."""
        return len(self._held[kind])

    def find(self, kind: str, id: str) -> Any:
        """A watched document, from memory; None when it is not there."""
        held = self._held[kind].get(id)
        if held is None or (held.expires_s is not None and held.expires_s <= self._wall_s()):
            return None
        return held.value

    async def load(self, kind: str, id: str) -> Any:
        """A watched document, from the store itself when it is not in memory."""
        found = self.find(kind, id)
        if found is None and len(id) <= 256:
            document = await self._call(self.state.get, kind, id)
            if document is not None:
                self._take(document)
                found = self.find(kind, id)
        return found

    async def create(self, kind: str, id: str, value: Any, *, ttl_s: float | None = None) -> bool:
        """Write a watched document; False when there is one already."""
        return await self._put(kind, id, value, 0, ttl_s)

    async def write(self, kind: str, id: str, value: Any, *, ttl_s: float | None = None) -> None:
        """Write a watched document, whatever is there."""
        await self._put(kind, id, value, None, ttl_s)

    async def write_all(self, kind: str, values: dict[str, Any]) -> None:
        """Write watched documents, whatever is there."""
        encoded = {id: msgspec.msgpack.encode(value) for id, value in values.items()}
        versions = await self._call(self.state.put_all, kind, encoded)
        for (id, value), version in zip(values.items(), versions):
            self._remember(kind, id, _Held(value, version, None))

    async def change(
        self,
        kind: str,
        id: str,
        step: Callable[[Any], Any],
        *,
        ttl_s: Callable[[Any], float | None] = lambda value: None,
    ) -> Any:
        """Replace a watched document by ``step`` of it, in one step; what it became, or None when
        there is none.  ``step`` may be called several times, and gives what it got, or None, to
        change nothing."""
        held = self._held[kind].get(id)
        for _ in range(_TRIES):
            if held is None:
                document = await self._call(self.state.get, kind, id)
                if document is None:
                    self._forget(kind, id)
                    return None
                self._take(document)
                held = self._held[kind].get(id)
                if held is None:
                    raise Refusal(503, "unreadable", f"{kind} {id} can't be read")
            new = step(held.value)
            if new is None or new is held.value or new == held.value:
                return held.value
            if await self._put(kind, id, new, held.version, ttl_s(new)):
                return new
            held = None
        raise Refusal(503, "busy", f"{kind} {id} changes too often", retry_after_s=1)

    async def remove(self, kind: str, id: str) -> None:
        """Delete a watched document."""
        await self._call(self.state.delete, kind, id)
        self._forget(kind, id)

    async def put_bytes(
        self, kind: str, id: str, value: bytes, *, ttl_s: float, new: bool = False
    ) -> bool:
        """Write a document that is not watched; False when it must be ``new`` and is not."""
        expect = 0 if new else None
        done = await self._call(self.state.put, kind, id, value, expect=expect, ttl_s=ttl_s)
        return done is not None

    async def get_bytes(self, kind: str, id: str) -> bytes | None:
        """A document that is not watched."""
        found = await self._call(self.state.get, kind, id)
        return None if found is None else found.value

    async def count(self, kind: str) -> int:
        """Documents of a kind in the store."""
        return await self._call(self.state.count, kind)

    async def refresh(self) -> None:
        """Take in what other controllers, or a process before this one, wrote."""
        while True:
            found = await self._call(
                self.state.changes, tuple(WATCHED), after=self._seen, limit=_PAGE
            )
            if found.epoch != self._epoch:
                known = self._epoch != ""
                self._epoch, self._seen = found.epoch, 0
                if known:  # the store was emptied: nothing of before holds
                    for call in self._on_emptied:
                        call()
                    for kind, held in self._held.items():
                        for id in list(held):
                            self._forget(kind, id)
                    continue
            for document in found.documents:
                self._seen = max(self._seen, document.version)
                if document.value is None:
                    self._forget(document.kind, document.id, document.version)
                else:
                    self._take(document)
            if len(found.documents) < _PAGE:
                return

    def prune(self) -> None:
        """Drop what has expired from memory."""
        now_s = self._wall_s()
        for kind, held in self._held.items():
            for id in [i for i, h in held.items() if h.expires_s and h.expires_s <= now_s]:
                self._forget(kind, id)

    async def close(self) -> None:
        """Close the store."""
        await anyio.to_thread.run_sync(self.state.close)

    async def _put(
        self, kind: str, id: str, value: Any, expect: int | None, ttl_s: float | None
    ) -> bool:
        body = msgspec.msgpack.encode(value)
        expires_s = None if ttl_s is None else self._wall_s() + ttl_s
        version = await self._call(self.state.put, kind, id, body, expect=expect, ttl_s=ttl_s)
        if version is None:
            return False
        self._remember(kind, id, _Held(value, version, expires_s))
        return True

    def _take(self, document: Document) -> None:
        held = self._held[document.kind].get(document.id)
        if held is not None and held.version >= document.version:
            return
        try:
            value = msgspec.msgpack.decode(document.value or b"", type=WATCHED[document.kind])
        except (msgspec.DecodeError, ValueError) as error:
            self.errors["unreadable"] += 1
            self._log.warn("controller_document", kind=document.kind, error=repr(error))
            return
        expires_s = document.expires_s
        self._remember(document.kind, document.id, _Held(value, document.version, expires_s))

    def _remember(self, kind: str, id: str, held: _Held) -> None:
        there = self._held[kind].get(id)
        if there is not None and there.version > held.version:
            return  # a later one came while ours was on its way
        self._held[kind][id] = held
        for listener in self._listeners:
            listener(kind, id)

    def _forget(self, kind: str, id: str, version: int | None = None) -> None:
        held = self._held[kind].get(id)
        if held is None or (version is not None and held.version > version):
            return
        del self._held[kind][id]
        for listener in self._listeners:
            listener(kind, id)

    async def _call(self, method: Callable[..., T], *args: Any, **options: Any) -> T:
        if self._failure is not None and self._now_s() < self._retry_at_s:
            raise StoreDown(self._failure)
        call = partial(method, *args, **options)
        try:
            found = await anyio.to_thread.run_sync(call, limiter=self._limiter)
        except LMCacheError as error:
            self.errors[type(error).__name__] += 1
            self._log.warn("controller_state", error=error)
            self._failure, self.down = error, error.message
            self._retry_at_s = self._now_s() + _REST_S
            raise StoreDown(error) from error
        self._failure, self.down = None, ""
        return found
