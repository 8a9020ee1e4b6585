"""``lmc controller``: the controller's life."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from lmcache_core.cli.fleet_options import TOKEN_FILE
from lmcache_core.cli.listening import address_of, allow_files, is_local, listen, state_file
from lmcache_core.cli.show import fail
from lmcache_core.config import parse_size
from lmcache_core.controller.config import ControllerConfig
from lmcache_core.controller.state import REDIS_SCHEMES, State, open_state
from lmcache_core.sdk import BackendUnavailable, ConfigError, LMCacheError
from lmcache_core.tokens import make_token
from lmcache_core.url import redact

if TYPE_CHECKING:
    import uvicorn

EPILOG = (
    "Examples:  lmc controller   |   lmc controller --host 10.0.0.5 --allow-host kv.example.com "
    "--tls-cert cert.pem --tls-key key.pem   |   "
    "lmc controller --state redis://127.0.0.1:6379/0 --port 0 --json"
)
_STATE = "controller.sqlite"
_KEEP_ALIVE_S = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Where to listen, and how to end; see ``lmc controller --help``."""

    host: str
    port: int
    state: str
    token_file: str
    tls_cert: str
    tls_key: str
    drain_timeout_s: float
    as_json: bool


def controller(
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 9300,
    state: Annotated[
        str,
        typer.Option(
            metavar="PATH|redis://...",
            help="Where jobs, pins, quotas and names are kept: a SQLite file, or Redis or Valkey "
            "for several controllers.  Else controller.sqlite under XDG_STATE_HOME.",
            envvar="LMCACHE_CONTROLLER_STATE",
        ),
    ] = "",
    token_file: Annotated[
        str,
        typer.Option(
            help="The operators' token; made, 0600, when it is not there.  Else controller.token "
            "under XDG_STATE_HOME."
        ),
    ] = "",
    instance_token_file: Annotated[
        str,
        typer.Option(help="A token for instances only, that can read and steer nothing; made too."),
    ] = "",
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name under which clients reach it; repeat for more."),
    ] = None,
    tls_cert: Annotated[str, typer.Option(help="PEM file with the certificate chain.")] = "",
    tls_key: Annotated[str, typer.Option(help="PEM file with its key.")] = "",
    lease_s: Annotated[float, typer.Option(help="Silent for so long is lost.")] = 30.0,
    job_timeout_s: Annotated[float, typer.Option(help="Not done by then has failed.")] = 3600.0,
    max_jobs: Annotated[int, typer.Option(help="Ended jobs that are kept.")] = 1000,
    max_pins: Annotated[int, typer.Option(help="Further ones are refused.")] = 10_000,
    max_pinned_bytes_per_owner: Annotated[
        str, typer.Option(help="Like 64GiB; 0 is no limit.")
    ] = "0",
    max_instances: Annotated[int, typer.Option(help="Further ones are refused.")] = 1024,
    max_chunks: Annotated[int, typer.Option(help="Of all instances; 200 bytes each.")] = 2_000_000,
    max_chunks_per_instance: Annotated[int, typer.Option(help="Of one instance.")] = 1_000_000,
    max_namespaces: Annotated[
        int, typer.Option(help="Of tenants and adapters, whose names are kept; 500 bytes each.")
    ] = 100_000,
    max_models: Annotated[int, typer.Option(help="Ever served, whose names are kept.")] = 1000,
    max_body_bytes: Annotated[str, typer.Option(help="Of a request, like 16MiB.")] = "16MiB",
    max_in_flight: Annotated[int, typer.Option(help="Requests; further ones get 503.")] = 256,
    drain_timeout_s: Annotated[
        float, typer.Option(help="After SIGTERM or Ctrl-C, for requests in flight.", min=0)
    ] = 10,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the line of the start as JSON, for scripts.")
    ] = False,
) -> None:
    """See and steer every cache of a fleet: an HTTP API and a web page.

    Instances find it by the setting controllers.  It asks nothing of the request path: engines go
    on as they are when it is away.  What it shows and how to ask: docs/controller.md, or
    /openapi.json.

    On start it prints one line: ready at http://HOST:PORT, and where its token is.  With --json
    that is {"event": "ready", "address": "http://HOST:PORT", "token_file": ..., ...}.
    """
    try:
        wish = Wish(
            host=host,
            port=port,
            state=state or _default(_STATE),
            token_file=token_file or _default(TOKEN_FILE),
            tls_cert=tls_cert,
            tls_key=tls_key,
            drain_timeout_s=drain_timeout_s,
            as_json=as_json,
        )
        config = ControllerConfig(
            token=make_token(wish.token_file),
            instance_token=make_token(instance_token_file) if instance_token_file else "",
            allowed_hosts=(*(allow_host or ()), *_own_name(host)),
            lease_s=lease_s,
            job_timeout_s=job_timeout_s,
            max_jobs=max_jobs,
            max_pins=max_pins,
            max_pinned_bytes_per_owner=parse_size(max_pinned_bytes_per_owner),
            max_instances=max_instances,
            max_chunks=max_chunks,
            max_chunks_per_instance=max_chunks_per_instance,
            max_namespaces=max_namespaces,
            max_models=max_models,
            max_body_bytes=parse_size(max_body_bytes),
            max_in_flight=max_in_flight,
        )
        serve_controller(config, wish)
    except LMCacheError as error:
        fail(error)


def serve_controller(config: ControllerConfig, wish: Wish) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises:
        ConfigError: the extra is not installed, the address can't be listened at, the state is
            another's, or the certificate is none.
    """
    try:
        import uvicorn

        from lmcache_core.controller.app import build
        from lmcache_core.controller.core import Controller
    except ImportError as error:
        raise ConfigError(
            f"lmc controller needs {error.name}",
            op="controller",
            hint="pip install 'lmcache-core[controller]'",
        ) from error
    _check_tls(wish)
    allow_files()
    with listen(wish.host, wish.port) as listener:
        state = open_state(wish.state)
        _try_state(state)
        known = Controller(config, state)
        app = build(config, known, on_start=lambda: _say_ready(wish, listener))
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(wish.drain_timeout_s),
            ssl_certfile=wish.tls_cert or None,
            ssl_keyfile=wish.tls_key or None,
        )
        # uvicorn raises the signal again when all is done, which would end us with its status.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        try:
            _server(settings, known.drain).run(sockets=[listener])
        finally:
            state.close()


def _server(settings: uvicorn.Config, drain: Callable[[], None]) -> uvicorn.Server:
    """A server that calls ``drain`` when it is told to end: what waits for news would keep it."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            drain()
            super().handle_exit(sig, frame)

    return Server(settings)


def _try_state(state: State) -> None:
    """Nothing, unless the store refuses us for good; one that is away may come."""
    try:
        state.count("job")
    except BackendUnavailable as error:
        typer.echo(f"warning: {error.message}; going on without it", err=True)


def _check_tls(wish: Wish) -> None:
    if bool(wish.tls_cert) != bool(wish.tls_key):
        raise ConfigError(
            "--tls-cert and --tls-key go together", op="controller", hint="give both, or none"
        )
    if wish.tls_cert:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(wish.tls_cert, wish.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"the certificate {wish.tls_cert} or its key can't be used: {error}",
                op="controller",
                hint="give PEM files",
            ) from error


def _default(name: str) -> str:
    """A file of this user's state directory, which is made."""
    file = state_file(name)
    folder = file.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} can't be made: {error.strerror}",
            op="controller",
            hint="set XDG_STATE_HOME, or give --state and --token-file",
        ) from error
    return str(file)


def _own_name(host: str) -> tuple[str, ...]:
    """The address itself is a name of ours, unless it means every address."""
    return () if host in ("0.0.0.0", "::", "") else (host,)


def _say_ready(wish: Wish, listener: socket.socket) -> None:
    address = address_of(listener, wish.host, scheme="https" if wish.tls_cert else "http")
    if not wish.tls_cert and not is_local(listener):
        typer.echo(
            f"warning: tokens and salts reach {address} unencrypted; --tls-cert and --tls-key "
            "encrypt them",
            err=True,
        )
    state = redact(wish.state) if wish.state.startswith(REDIS_SCHEMES) else wish.state
    facts = {
        "event": "ready",
        "address": address,
        "state": state,
        "token_file": wish.token_file,
        "pid": os.getpid(),
    }
    if wish.as_json:
        print(json.dumps(facts), flush=True)
        return
    print(
        f"ready at {address}: token in {wish.token_file}, state in {state}; pid {os.getpid()}",
        flush=True,
    )
