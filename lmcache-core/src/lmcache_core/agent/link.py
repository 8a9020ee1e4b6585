"""One instance's link to one controller: a thread that syncs, and starts over when it is lost."""

from __future__ import annotations

import random
import threading
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from lmcache_core.agent import wire
from lmcache_core.agent.changes import Cursor
from lmcache_core.agent.http import ControllerLink
from lmcache_core.logs import EventLog
from lmcache_core.sdk import LMCacheError

if TYPE_CHECKING:
    from lmcache_core.agent.agent import Agent

FIRST_RETRY_S = 0.1
MAX_RETRY_S = 5.0
ACTIVE_SYNC_S = 0.05
"""Between two syncs while orders are under way."""
ANSWER_TIMEOUT_S = 10.0
"""For an answer, beyond what the controller was allowed to wait."""
MAX_ANSWERS = 64

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(wire.Reply)


class Link:
    """Made with its agent; `start` begins.

    A controller that can't be reached costs this thread alone; what it then lacks it is told anew.

    Raises:
        ConfigError: the URL or ``ca_file`` is wrong.
    """

    def __init__(self, agent: Agent, url: str, *, token: str, ca_file: str, sync_s: float) -> None:
        self.url = url
        self._agent = agent
        self._http = ControllerLink(url, token=token, ca_file=ca_file)
        self._sync_s = sync_s
        self._log = EventLog()
        self._cursor: Cursor | None = None
        if agent.changes is not None:
            self._cursor = agent.changes.cursor()
        self._next = 1
        self._next_namespace = 0
        self._fresh = True
        self._resetting = False
        self._controller = ""
        self._limits_version = ""
        self._answers: deque[wire.Answer] = deque(maxlen=MAX_ANSWERS)
        self._stopping = threading.Event()
        self.connected = False
        self.thread = threading.Thread(target=self._run, name="lmc-controller", daemon=True)

    @property
    def wants_all(self) -> bool:
        """Whether the owner is to say all that is held."""
        return self._cursor is not None and self._cursor.wanted

    def start(self) -> None:
        """Begin."""
        self.thread.start()

    def stop(self) -> None:
        """End; a request that waits is broken off."""
        self._stopping.set()
        self._http.abort()

    def answer(self, answer: wire.Answer) -> None:
        """To a question of this controller; from any thread."""
        self._answers.append(answer)

    def _run(self) -> None:
        retry_s = FIRST_RETRY_S
        while not self._stopping.is_set():
            try:
                reply = self._sync()
            except (LMCacheError, msgspec.MsgspecError, ValueError) as error:
                if self._stopping.is_set():
                    break
                self._lost(error)
                self._stopping.wait(retry_s * random.uniform(0.5, 1.0))
                retry_s = min(retry_s * 2, MAX_RETRY_S)
                continue
            if not self.connected:
                self.connected = True
                self._log.warn("controller_linked", url=self.url)
            retry_s = FIRST_RETRY_S
            if reply is not None:
                self._take(reply)
            if self._agent.active and not self._answers:
                self._stopping.wait(ACTIVE_SYNC_S)
        self._http.close()

    def _sync(self) -> wire.Reply | None:
        """One round; None while all is to be said and the owner has not said it."""
        agent = self._agent
        if self._fresh:
            self._fresh, self._resetting = False, True
            self._next, self._next_namespace = 1, 0
            if self._cursor is not None and agent.changes is not None:
                agent.changes.again(self._cursor)
        if self.wants_all:
            agent.wake()
            self._stopping.wait(0.005)
            return None
        changes = agent.changes.take(self._cursor) if agent.changes and self._cursor else ()
        if self.wants_all:  # it fell behind: start over
            self._fresh = True
            return None
        more = self._cursor is not None and bool(self._cursor.pieces)
        next_namespace, notes = agent.namespaces(self._next_namespace)
        answers = tuple(self._answers.popleft() for _ in range(len(self._answers)))
        idle = not (changes or more or answers or agent.active or self._resetting)
        sync = wire.Sync(
            version=wire.VERSION,
            instance=agent.about.name,
            incarnation=agent.incarnation,
            kind=agent.about.kind,
            seq=self._next,
            reset=self._resetting,
            more=more,
            changes=changes,
            models=agent.about.models if self._resetting else (),
            namespaces=notes,
            status=agent.status(),
            progress=agent.progress(),
            answers=answers,
            limits_version=self._limits_version,
            wait_s=self._sync_s if idle else 0.0,
        )
        reply = self._post(sync)
        self._resetting = False
        self._next += len(changes)
        self._next_namespace = next_namespace
        if not idle and not (more or answers or agent.active):
            # Changes are collected for a while.
            self._stopping.wait(min(self._sync_s, 0.1))
        return reply

    def _post(self, sync: wire.Sync) -> wire.Reply:
        answer = self._http.request(
            "POST",
            wire.PATH,
            _encoder.encode(sync),
            timeout_s=sync.wait_s + ANSWER_TIMEOUT_S,
            content_type=wire.CONTENT_TYPE,
        )
        if answer.status != 200:
            text = answer.body[:300].decode("utf-8", "replace")
            raise LMCacheError(f"the controller refuses: {answer.status} {text}", op="controller")
        return _decoder.decode(answer.body)

    def _take(self, reply: wire.Reply) -> None:
        if reply.resync or (self._controller and reply.controller != self._controller):
            self._fresh = True
            self._agent.metrics.counter("agent.resyncs").inc()
        self._controller = reply.controller
        if reply.limits is not None:
            self._limits_version = reply.limits_version
        self._agent.take(reply, self)

    def _lost(self, error: Exception) -> None:
        self._http.close()
        self._fresh = True
        self._limits_version = ""
        self._agent.metrics.counter("agent.sync_failed").inc()
        if self.connected or not self._controller:
            self._log.warn("controller_lost", url=self.url, error=str(error))
        self.connected = False
