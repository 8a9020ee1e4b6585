"""``lmc pd-proxy``: the proxy's life."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
from dataclasses import dataclass
from typing import Annotated

import typer

from lmcache_core.cli.listening import address_of, allow_files, is_local, listen
from lmcache_core.cli.show import fail
from lmcache_core.config import parse_size
from lmcache_core.proxy import Engine, ProxyConfig
from lmcache_core.sdk import ConfigError, LMCacheError
from lmcache_core.tokens import make_token

EPILOG = (
    "Examples:  lmc pd-proxy --prefill http://127.0.0.1:8100 "
    "--decode http://127.0.0.1:8200@tcp://127.0.0.1:7001   |   "
    "lmc pd-proxy --prefill http://p0:8000 --prefill http://p1:8000 "
    "--decode http://d0:8000@tcp://d0:7001 --port 0 --json"
)


@dataclass(frozen=True, slots=True)
class Listening:
    """Where to listen, and how to end; see ``lmc pd-proxy --help``."""

    host: str
    port: int
    drain_timeout_s: float
    as_json: bool


def pd_proxy(
    prefill: Annotated[list[str], typer.Option(help="URL of a prefill engine; repeat for more.")],
    decode: Annotated[
        list[str],
        typer.Option(
            metavar="URL@CHANNEL",
            help="A decode engine, and the address of its channel; repeat for more.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    token_file: Annotated[
        str,
        typer.Option(
            help="Ask clients for the token in it (Authorization: Bearer); made when it is not "
            "there.  Engines get the same header: start them with this --api-key, or none."
        ),
    ] = "",
    max_body_bytes: Annotated[str, typer.Option(help="Of a request, like 16MiB.")] = "16MiB",
    max_in_flight: Annotated[int, typer.Option(help="Requests; further ones get 429.")] = 256,
    connect_timeout_s: Annotated[float, typer.Option(help="To an engine.")] = 5.0,
    stall_timeout_s: Annotated[
        float, typer.Option(help="Between two pieces of an engine's answer.")
    ] = 600.0,
    retry_s: Annotated[float, typer.Option(help="Leave a failed engine alone for this long.")] = 2,
    drain_timeout_s: Annotated[
        float, typer.Option(help="After SIGTERM or Ctrl-C, for requests in flight.", min=0)
    ] = 30,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the line of the start as JSON, for scripts.")
    ] = False,
) -> None:
    """Serve OpenAI's API from prefill engines and decode engines.

    Each completion goes to both at once, under one transfer id; the client gets the decoder's
    answer as it comes.  A prefiller that is lost costs time: the decoder computes what did not
    arrive by its deadline.  Several prompts, several answers (n above 1) or prompt_logprobs go to
    a decoder alone, since a transfer belongs to one sequence.  Also serves /v1/models, /health and
    /metrics.

    On start it prints one line: ready at http://HOST:PORT, and how many engines it has.  With
    --json that is {"event": "ready", "address": "http://HOST:PORT", ...}.
    """
    try:
        wish = Listening(host, port, drain_timeout_s, as_json)
        config = ProxyConfig(
            prefillers=tuple(map(Engine.prefiller, prefill)),
            decoders=tuple(map(Engine.decoder, decode)),
            max_body_bytes=parse_size(max_body_bytes),
            max_in_flight=max_in_flight,
            connect_timeout_s=connect_timeout_s,
            stall_timeout_s=stall_timeout_s,
            retry_s=retry_s,
            token=make_token(token_file) if token_file else "",
        )
        serve_proxy(config, wish)
    except LMCacheError as error:
        fail(error)


def serve_proxy(config: ProxyConfig, wish: Listening) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises:
        ConfigError: the extra is not installed, or the address can't be listened at.
    """
    try:
        import uvicorn

        from lmcache_core.proxy.app import build
    except ImportError as error:
        raise ConfigError(
            f"lmc pd-proxy needs {error.name}",
            op="pd-proxy",
            hint="pip install 'lmcache-core[proxy]'",
        ) from error
    allow_files()
    listener = listen(wish.host, wish.port)
    with listener:
        app = build(config, on_start=lambda: _say_ready(config, wish, listener))
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                lifespan="on",
                timeout_graceful_shutdown=math.ceil(wish.drain_timeout_s),
            )
        )
        # uvicorn raises the signal again when all is done, which would end us with its status.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])


def _say_ready(config: ProxyConfig, wish: Listening, listener: socket.socket) -> None:
    address = address_of(listener, wish.host)
    if not config.token and not is_local(listener):
        typer.echo(
            f"warning: whoever reaches {address} may ask; --token-file asks for a token", err=True
        )
    facts = {
        "event": "ready",
        "address": address,
        "prefill": [engine.url for engine in config.prefillers],
        "decode": [engine.url for engine in config.decoders],
        "pid": os.getpid(),
    }
    if wish.as_json:
        print(json.dumps(facts), flush=True)
        return
    engines = f"{len(config.prefillers)} prefill and {len(config.decoders)} decode engines"
    print(f"ready at {address}: {engines}; pid {os.getpid()}", flush=True)
