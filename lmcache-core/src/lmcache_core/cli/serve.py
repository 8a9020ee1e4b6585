"""``lmc serve`` and ``lmc node``: a node server's life, and a look at one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from lmcache_core.agent.agent import About
from lmcache_core.chunks import ChunkEngine
from lmcache_core.cli.listening import allow_files
from lmcache_core.config import EngineConfig
from lmcache_core.joining import join_engine
from lmcache_core.metrics import Metrics
from lmcache_core.node import protocol
from lmcache_core.node.address import Address, Listener, default_path, listen
from lmcache_core.node.link import greet
from lmcache_core.node.server import TICK_S, NodeServer
from lmcache_core.node.wake import Wake
from lmcache_core.opening import instance_name, open_chunks
from lmcache_core.sdk import BackendUnavailable, ConfigError
from lmcache_core.tokens import make_token
from lmcache_core.transfer.executor import Runtime

_LOOPBACK = "127.0.0.1"
_STATUS_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Serving:
    """Where to serve; see ``lmc serve --help``."""

    socket: str
    listen: str
    token_file: str
    metrics: str
    as_json: bool


def serve_node(config: EngineConfig, wish: Serving) -> int:
    """Serve until a signal comes, then drain.  Returns the exit code: 1 when something was not
    flushed.

    Raises:
        ConfigError: a wrong address, a server that runs there already, a wrong configuration.
        BackendUnavailable: a store that can't be reached.
    """
    allow_files()
    wake = Wake()
    with contextlib.ExitStack() as undo:
        # Before the memory: a second server is told at once.
        listeners = [listen(address) for address in _addresses(wish, config)]
        for listener in listeners:
            undo.callback(listener.close)
        token = make_token(wish.token_file) if wish.listen else ""
        engine = open_chunks(config, runtime=Runtime(wake.set))
        if wish.metrics:
            try:
                undo.enter_context(_exporter(engine.metrics, wish.metrics))
            except BaseException:
                engine.close()
                raise
        server = NodeServer(engine, listeners, wake, token=token)
        try:
            _join(engine, server)
        except BaseException:
            server.close()
            engine.close()
            raise
        with _signals(server.stop) as signals:
            _say_ready(config, listeners, engine, as_json=wish.as_json)
            server.run()
            _notify("STOPPING=1")
            flushed = _drain(server, engine, config.drain_timeout_s, lambda: signals[0] > 1)
            server.close()
            if signals[0] > 1:
                # No more waiting, not even for what runs: as good as killed.
                return 1
            return 0 if engine.close() and flushed else 1


def _join(engine: ChunkEngine, server: NodeServer) -> None:
    """Tell the controllers of the configuration, if it names some."""

    def about() -> About:
        name = instance_name(engine.config, node=True)
        return About(name=name, kind="node", incarnation=server.incarnation)

    # Its own thread only has the server's look.
    agent = join_engine(engine, about, turn=lambda: engine.runtime.completions.post(_nothing))
    if agent is not None:
        agent.start()


def _nothing() -> None:
    """What wakes the server."""


def node_status(address: str, token_file: str) -> dict[str, Any]:
    """What the node server at ``address``, or at the default one, does, as plain values.

    Raises:
        ConfigError: a wrong address or token.
        BackendUnavailable: no server answers there.
    """
    where = Address.parse(address or default_path())
    link = greet(where, role="control", token_file=token_file, timeout_s=_STATUS_TIMEOUT_S)
    try:
        link.say(protocol.Ask())
        end_s = time.monotonic() + _STATUS_TIMEOUT_S
        while not link.broken and time.monotonic() < end_s:
            link.flush()
            link.wait(end_s - time.monotonic())
            for message in link.read():
                if isinstance(message, protocol.Status):
                    fields = protocol.Status.__struct_fields__
                    return {name: msgspec.to_builtins(getattr(message, name)) for name in fields}
    finally:
        link.close()
    raise BackendUnavailable(
        f"the node server at {where} does not answer", op="node", hint="is it stopped?"
    )


def _addresses(wish: Serving, config: EngineConfig) -> list[Address]:
    """The unix socket, where engines with this configuration look for it, and TCP if wished."""
    addresses = [Address.parse(wish.socket or config.node or default_path())]
    if addresses[0].is_tcp:
        raise ConfigError(
            f"{addresses[0]} is no path", op="serve", hint="--socket is a path, TCP is --listen"
        )
    if wish.listen:
        if not wish.token_file:
            raise ConfigError(
                "--listen asks for a token", op="serve", hint="give --token-file PATH"
            )
        addresses.append(Address.parse(wish.listen))
        if not addresses[1].is_tcp:
            raise ConfigError(f"{wish.listen} is not TCP", op="serve", hint="tcp://127.0.0.1:9250")
    return addresses


def _say_ready(
    config: EngineConfig, listeners: list[Listener], engine: ChunkEngine, *, as_json: bool
) -> None:
    facts = {
        "event": "ready",
        "listening": [str(listener.address) for listener in listeners],
        "host_bytes": config.host_bytes,
        "tiers": [tier.name for tier in engine.tiers.readable],
        "pid": os.getpid(),
    }
    if as_json:
        print(json.dumps(facts), flush=True)
    else:
        below = ", ".join(tier.name for tier in engine.tiers.readable) or "nothing"
        print(
            f"ready at {' and '.join(str(listener.address) for listener in listeners)}: "
            f"host {config.host_bytes / (1 << 30):.1f} GiB, below it {below}; pid {os.getpid()}",
            flush=True,
        )
    _notify("READY=1")


def _notify(state: str) -> None:
    """Tell the service manager that started us, if one did."""
    target = os.environ.get("NOTIFY_SOCKET", "")
    if not target:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect("\0" + target[1:] if target.startswith("@") else target)
            sock.send(state.encode())
        except OSError as error:
            Console(stderr=True).print(f"warning: no service manager at {target}: {error}")


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Have SIGTERM and SIGINT ``stop``; gives how many came."""
    came = [0]

    def handle(number: int, frame: object) -> None:
        came[0] += 1
        stop()

    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(kind, handle) for kind in kinds]
    try:
        yield came
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)


def _drain(
    server: NodeServer, engine: ChunkEngine, limit_s: float, hurried: Callable[[], bool]
) -> bool:
    """Let sessions end what they write, then the tiers, each for at most ``limit_s`` or until
    ``hurried``; whether all is where it belongs."""
    server.refuse_new()
    unstored = engine.unstored
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        end_s = time.monotonic() + limit_s
        while server.slots and time.monotonic() < end_s and not hurried():
            server.turn(TICK_S)
        engine.write_all()
        total = engine.unsettled_bytes
        task = progress.add_task("to lower tiers", total=total or None, visible=total > 0)
        end_s = time.monotonic() + limit_s
        while engine.unsettled and time.monotonic() < end_s and not hurried():
            server.turn(TICK_S)
            left = engine.unsettled
            progress.update(
                task,
                completed=total - engine.unsettled_bytes,
                description=f"to lower tiers, {left} chunks left",
            )
    return not (server.slots or engine.unsettled) and engine.unstored == unstored


@contextlib.contextmanager
def _exporter(metrics: Metrics, where: str) -> Iterator[None]:
    """Serve ``metrics`` to Prometheus at ``[HOST:]PORT``.

    Raises:
        ConfigError: no such place, or prometheus-client is not installed.
    """
    host, _, port = where.rpartition(":")
    try:
        from prometheus_client import CollectorRegistry, start_http_server

        from lmcache_core.prometheus import EngineCollector
    except ImportError as error:
        raise ConfigError(
            "--metrics needs prometheus-client",
            op="serve",
            hint="pip install 'lmcache-core[prometheus]'",
        ) from error
    registry = CollectorRegistry()
    registry.register(EngineCollector(metrics))
    try:
        served, thread = start_http_server(int(port), host or _LOOPBACK, registry)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"metrics can't be served at {where}: {error}", op="serve", hint="give [HOST:]PORT"
        ) from error
    try:
        yield
    finally:
        served.shutdown()
        thread.join(_STATUS_TIMEOUT_S)
