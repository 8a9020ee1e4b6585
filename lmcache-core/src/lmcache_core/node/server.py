"""The node server: one thread, one `ChunkEngine`, many clients.

    wake = Wake()
    engine = open_chunks(config, runtime=Runtime(wake.set))
    NodeServer(engine, [listen(address)], wake).run()

The thread waits for sockets and for finished work of the tiers at the same time, and does
nothing that blocks.
"""

from __future__ import annotations

import hmac
import os
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Sequence

from lmcache_core.chunks import ChunkEngine
from lmcache_core.envelope import stored_bytes
from lmcache_core.logs import EventLog
from lmcache_core.node import protocol
from lmcache_core.node.address import Listener, is_trusted, peer_uid
from lmcache_core.node.connection import Connection
from lmcache_core.node.protocol import FromClient, Hello, ProtocolError, Refused, Welcome
from lmcache_core.node.session import Session
from lmcache_core.node.wake import Wake
from lmcache_core.sdk import ContractViolation, LMCacheError

GREETING_S = 5.0
"""For `Hello`; whoever is slower owns nothing yet, and is closed."""
CONNECTIONS_PER_SESSION = 32
"""An engine and its workers; bounds all connections together."""
TICK_S = 0.02
"""Between looks at deadlines while something waits."""
IDLE_S = 1.0


class NodeServer:
    """Serves ``engine`` to all that come through ``listeners``, which it closes.

    `stop` may come from anywhere; the rest belongs to the thread that calls `run`.

    Args:
        wake: what the engine's runtime wakes.
        token: what clients over TCP must show.
        uid_of: tells the user behind a unix socket.

    Attributes:
        incarnation: names this server's memory.
    """

    def __init__(
        self,
        engine: ChunkEngine,
        listeners: Sequence[Listener],
        wake: Wake,
        *,
        token: str = "",
        uid_of: Callable[[socket.socket], int] = peer_uid,
    ) -> None:
        config, capacity = engine.config, engine.host.capacity_bytes
        self.engine = engine
        self.incarnation = secrets.token_hex(8)
        self._limit_bytes = config.max_session_bytes or capacity // 2
        self._token = token
        self._uid_of = uid_of
        self._wake = wake
        self._log = EventLog()
        self._started_s = time.monotonic()
        self._stopping = False
        self._connections: set[Connection] = set()
        self._greeting: set[Connection] = set()
        self._unread: dict[Connection, None] = {}
        self._unsent: set[Connection] = set()
        self._untidy: set[Session] = set()
        self._sessions: dict[str, Session] = {}
        self._members: dict[str, set[Connection]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(wake.fd, selectors.EVENT_READ, wake)
        self._listeners = list(listeners)
        self._paused = list(listeners)
        self._listen()
        engine.metrics.gauge("node.sessions", lambda: len(self._sessions))
        engine.metrics.gauge("node.held_bytes", self._held_bytes)

    @property
    def slots(self) -> int:
        """Slots that clients write now."""
        return sum(session.slots for session in self._sessions.values())

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._stopping:
            self.turn(IDLE_S)

    def stop(self) -> None:
        """Have `run` return."""
        self._stopping = True
        self._wake.set()

    def turn(self, timeout_s: float) -> None:
        """Wait for something, at most ``timeout_s``, and do what is to be done."""
        readable, self._unread = self._unread, {}
        if readable:
            timeout_s = 0.0
        elif self.engine.unsettled or any(s.undecided for s in self._sessions.values()):
            timeout_s = min(timeout_s, TICK_S)
        for ready, events in self._selector.select(timeout_s):
            owner = ready.data
            if isinstance(owner, Connection):
                if events & selectors.EVENT_READ:
                    readable[owner] = None
            elif isinstance(owner, Listener):
                self._accept(owner)
            else:
                self._wake.clear()
        for connection in readable:
            self._read(connection)
        self._flush()
        while self._untidy:
            self._untidy.pop().tidy()
        self.engine.poll()
        for ident, session in self._sessions.items():
            if session.undecided:
                self._answer(ident, session)
        self._flush()
        self._end_slow_greetings()

    def refuse_new(self) -> None:
        """Take no new clients, and give those that are here nothing new."""
        self._listen()
        for listener in self._listeners:
            self._selector.unregister(listener.socket)
            listener.close()
        self._listeners.clear()
        for session in self._sessions.values():
            session.closing = True

    def close(self) -> None:
        """Close every connection; what clients held is freed.  The engine stays open."""
        self.refuse_new()
        for connection in list(self._connections):
            self._drop(connection)
        self._selector.close()

    def status(self) -> protocol.Status:
        """What the server does now."""
        engine = self.engine
        return protocol.Status(
            version=protocol.package_version(),
            pid=os.getpid(),
            incarnation=self.incarnation,
            uptime_s=time.monotonic() - self._started_s,
            host_used_bytes=engine.host.used_bytes,
            host_capacity_bytes=engine.host.capacity_bytes,
            host_chunks=len(engine.host.keys()),
            unsettled_writes=engine.unsettled,
            tiers=tuple(
                protocol.TierStatus(t.name, t.used_bytes, t.available, t.unavailable_reason)
                for t in engine.tiers.readable
            ),
            sessions=tuple(
                protocol.SessionStatus(
                    s.pid, len(self._members[ident]), s.slots, s.tickets, s.held_bytes
                )
                for ident, s in self._sessions.items()
            ),
            counters=engine.metrics.snapshot(),
        )

    def _held_bytes(self) -> int:
        return sum(session.held_bytes for session in list(self._sessions.values()))

    def _count(self, event: str, amount: int = 1) -> None:
        if amount:
            self.engine.metrics.counter(f"node.{event}").inc(amount)

    def _listen(self) -> None:
        while self._paused:
            listener = self._paused.pop()
            self._selector.register(listener.socket, selectors.EVENT_READ, listener)

    def _accept(self, listener: Listener) -> None:
        try:
            sock, _ = listener.socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return
        except OSError as error:
            # No more files, most likely: those who are here go on, and it waits for one to leave.
            self._count("accept_failed")
            self._log.warn("node_accept_failed", reason=error.strerror)
            self._selector.unregister(listener.socket)
            self._paused.append(listener)
            return
        limit = self.engine.config.max_sessions * CONNECTIONS_PER_SESSION
        if len(self._connections) >= limit:
            self._count("refused.full")
            sock.close()
            return
        if listener.address.is_tcp:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        elif not is_trusted(sock, self._uid_of):
            self._count("refused.uid")
            self._log.warn("node_client_refused", reason="another user")
            sock.close()
            return
        sock.setblocking(False)
        connection = Connection(sock)
        self._connections.add(connection)
        self._greeting.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _read(self, connection: Connection) -> None:
        try:
            bodies = connection.read()
            if bodies is None:
                self._drop(connection)
                return
            for body in bodies:
                if not connection.deaf:
                    self._handle(connection, protocol.read_client(body))
            if connection.has_more:
                self._unread[connection] = None
        except LMCacheError as error:
            # Its slots and pins stay until its end: it may be copying.
            self._count("protocol_errors")
            self._log.warn("node_protocol_error", reason=error.message)
            connection.deaf = True
            connection.mute()

    def _handle(self, connection: Connection, message: FromClient) -> None:
        if not connection.role:
            self._greet(connection, message)
            return
        if isinstance(message, protocol.Ask):
            if not connection.muted:
                self._say(connection, self.status())
            return
        session = connection.session
        if session is None or connection.role != "engine":
            raise ProtocolError(f"a {connection.role} connection that asks for chunks", op="node")
        match message:
            case protocol.Prefetch():
                self._say(connection, session.prefetch(message))
            case protocol.Release():
                session.release(message)
                self._untidy.add(session)
            case protocol.Reserve():
                self._say(connection, session.reserve(message))
            case protocol.Commit():
                session.commit(message)
            case protocol.Abort():
                session.abort(message)
            case protocol.Touch():
                session.touch(message)
            case protocol.Forget():
                session.forget(message)
            case _:
                raise ProtocolError("a second greeting", op="node")

    def _greet(self, connection: Connection, message: FromClient) -> None:
        if not isinstance(message, Hello):
            raise ProtocolError("no greeting", op="node")
        refused = self._refusal(connection, message) or self._join(connection, message)
        if refused is not None:
            self._count(f"refused.{refused.reason}")
            self._say(connection, refused)
            connection.flush()
            connection.deaf = True
            connection.mute()
            return
        self._greeting.discard(connection)
        connection.role = message.role
        arena = self.engine.host.arena
        welcome = Welcome(
            session=connection.session.ident if connection.session else "",
            incarnation=self.incarnation,
            arena=(arena.ref.pid, arena.ref.fd, arena.nbytes),
            capacity_bytes=self.engine.host.capacity_bytes,
            tiers=tuple(tier.name for tier in self.engine.tiers.readable),
        )
        if connection.sock.family == socket.AF_UNIX and message.role == "worker":
            connection.hand_over(welcome, arena.ref.fd)
            self._unsent.add(connection)
        else:
            self._say(connection, welcome)

    def _refusal(self, connection: Connection, message: Hello) -> Refused | None:
        if message.version != protocol.VERSION:
            version = protocol.package_version()
            return Refused(
                "version",
                f"the node server speaks version {protocol.VERSION}, not {message.version}",
                f"pip install 'lmcache-core=={version}' on both sides",
            )
        if connection.sock.family != socket.AF_UNIX and not (
            self._token and hmac.compare_digest(self._token.encode(), message.token.encode())
        ):
            self._log.warn("node_client_refused", reason="wrong token")
            return Refused("token", "the token is wrong", "set node_token_file to the server's")
        return None

    def _join(self, connection: Connection, message: Hello) -> Refused | None:
        """Give the connection its session."""
        if message.role == "control":
            return None
        if message.role == "worker":
            session = self._sessions.get(message.session)
            if session is None:
                return Refused("session", "no such session", "the engine must connect anew")
            connection.session = session
            self._members[session.ident].add(connection)
            return None
        if not self._listeners:
            return Refused("closing", "the node server is stopping", "wait for its successor")
        if len(self._sessions) >= self.engine.config.max_sessions:
            return Refused("full", "too many sessions", "raise max_sessions")
        try:
            layouts = [spec.layout() for spec in message.layouts]
        except ContractViolation as error:
            why = error.message[: protocol.MAX_TEXT]
            return Refused("layout", why, "the engine's adapter describes its pages wrongly")
        largest = max((stored_bytes(layout.payload_bytes) for layout in layouts), default=0)
        if largest > self._limit_bytes:
            return Refused(
                "layout",
                f"one chunk takes {largest} bytes, a session may hold {self._limit_bytes}",
                "give the node server a larger host tier, or raise max_session_bytes",
            )
        ident = secrets.token_hex(16)
        connection.session = self._sessions[ident] = Session(
            ident, self.engine, layouts, limit_bytes=self._limit_bytes, pid=message.pid
        )
        self._members[ident] = {connection}
        self._count("sessions_opened")
        return None

    def _answer(self, ident: str, session: Session) -> None:
        for decided in session.decided():
            for connection in self._members[ident]:
                if connection.role == "engine":
                    self._say(connection, decided)

    def _say(self, connection: Connection, message: protocol.FromServer) -> None:
        if connection.say(message):
            self._unsent.add(connection)
            return
        self._count("overflows")
        self._log.warn("node_client_muted", reason="it does not read")
        self._watch(connection)

    def _flush(self) -> None:
        for connection in list(self._unsent):
            connection.flush()
            self._watch(connection)

    def _watch(self, connection: Connection) -> None:
        """Wait for room to send only while something waits for it."""
        if not connection.unsent:
            self._unsent.discard(connection)
        if connection.blocked != connection.unsent:
            connection.blocked = connection.unsent
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.blocked else 0)
            self._selector.modify(connection.sock, events, connection)

    def _end_slow_greetings(self) -> None:
        if self._greeting:
            oldest_s = time.monotonic() - GREETING_S
            for connection in [c for c in self._greeting if c.since_s < oldest_s]:
                self._count("refused.slow")
                self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        self._selector.unregister(connection.sock)
        connection.sock.close()
        self._listen()
        self._unread.pop(connection, None)
        for group in (self._connections, self._greeting, self._unsent):
            group.discard(connection)
        session = connection.session
        if session is None:
            return
        members = self._members[session.ident]
        members.discard(connection)
        if members:
            return
        # The last of its processes has closed, or died: nobody can touch its memory.
        del self._sessions[session.ident], self._members[session.ident]
        self._untidy.discard(session)
        slots, tickets = session.end()
        self._count("sessions_ended")
        self._count("reclaimed_slots", slots)
        self._count("reclaimed_tickets", tickets)
