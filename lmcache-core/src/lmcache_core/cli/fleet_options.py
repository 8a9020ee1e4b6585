"""Options that fleet commands share: which controllers, and which chunks."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any, TypeVar

import msgspec
import typer

from lmcache_core.agent.http import ControllerLink
from lmcache_core.agent.wire import tenant_id as id_of
from lmcache_core.cli.fleet_link import MAX_CONTROLLERS, Fleet
from lmcache_core.cli.listening import state_file
from lmcache_core.controller.messages import Place, Selection
from lmcache_core.sdk import ConfigError
from lmcache_core.tokens import read_token

DEFAULT_URL = "http://127.0.0.1:9300"
URL_VARIABLE = "LMCACHE_CONTROLLERS"
"""The setting of engines, so that one value is for both."""
TOKEN_VARIABLE = "LMCACHE_CONTROLLER_TOKEN_FILE"
TENANT_VARIABLE = "LMCACHE_TENANT"
TOKEN_FILE = "controller.token"
"""Of the operators, in the state directory, unless told otherwise."""
MAX_INPUT_BYTES = 16 << 20
_CONNECTION = "Connection"
_SELECTION = "Which chunks"

S = TypeVar("S", bound=msgspec.Struct)


def _listed(text: str) -> list[str]:
    """Addresses with commas between them, or a list as engines are given it."""
    return [word.strip(" \t'\"") for word in text.strip(" []").split(",")]


def connect(
    controller: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help=f"Address of a controller; repeat for more: the next is asked when one is away.  "
            f"Else {URL_VARIABLE}, separated by commas, else {DEFAULT_URL}.",
            rich_help_panel=_CONNECTION,
        ),
    ] = None,
    token_file: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help=f"The operators' token.  Else {TOKEN_VARIABLE}, else controller.token in "
            "$XDG_STATE_HOME/lmcache-core, where `lmc controller` makes it.",
            rich_help_panel=_CONNECTION,
        ),
    ] = "",
    ca_file: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="PEM certificates to trust, for https://.",
            rich_help_panel=_CONNECTION,
        ),
    ] = "",
) -> Fleet:
    """The controllers that the options, or variables, name.

    Raises:
        ConfigError: a wrong address, token file or certificate.
    """
    urls = controller or _listed(os.environ.get(URL_VARIABLE, ""))
    urls = [url.strip() for url in urls if url.strip()] or [DEFAULT_URL]
    if len(urls) > MAX_CONTROLLERS:
        raise ConfigError(f"{len(urls)} controllers", hint=f"name at most {MAX_CONTROLLERS}")
    file = token_file or os.environ.get(TOKEN_VARIABLE, "") or str(state_file(TOKEN_FILE))
    token = read_token(file)
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"the token in {file} has characters that no token has",
            hint="copy the controller's file as it is",
        )
    unique = dict.fromkeys(urls)
    return Fleet([ControllerLink(url, token=token, ca_file=ca_file) for url in unique])


def chosen(
    tokens: Annotated[
        str,
        typer.Option(
            metavar="FILE|-",
            help="A prefix: file of token ids, a JSON list or separated by blanks; - is stdin.",
            rich_help_panel=_SELECTION,
        ),
    ] = "",
    text: Annotated[
        str,
        typer.Option(
            metavar="TEXT|@FILE|@-",
            help="A prefix: text of a prompt, which an instance turns into tokens.",
            rich_help_panel=_SELECTION,
        ),
    ] = "",
    keys: Annotated[
        str,
        typer.Option(
            metavar="KEY,...|@FILE|@-",
            help="Stored keys in hex, as lookup --json shows them.",
            rich_help_panel=_SELECTION,
        ),
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|NAME@TAG",
            help="Everything of it; of a prefix: the model it is for.",
            rich_help_panel=_SELECTION,
        ),
    ] = "",
    tenant_file: Annotated[
        str,
        typer.Option(
            metavar="FILE|-",
            help=f"File with a tenant's cache_salt: everything of that tenant, or its prefix.  "
            f"Or set {TENANT_VARIABLE}.",
            rich_help_panel=_SELECTION,
        ),
    ] = "",
    tenant: Annotated[
        str | None,
        typer.Option(
            metavar="SALT",
            help="The salt itself; others on this host can see it: better --tenant-file.  "
            "'' is requests without a salt.",
            rich_help_panel=_SELECTION,
        ),
    ] = None,
    tenant_id: Annotated[
        str,
        typer.Option(
            metavar="ID",
            help="A tenant as `lmc usage` shows it; not for prefixes.",
            rich_help_panel=_SELECTION,
        ),
    ] = "",
    lora: Annotated[
        str,
        typer.Option(
            metavar="DIGEST",
            help="Of a prefix: content digest of its adapter, as `lmc usage` shows it.",
            rich_help_panel=_SELECTION,
        ),
    ] = "",
    everything: Annotated[
        bool,
        typer.Option("--all", help="Everything of everybody.", rich_help_panel=_SELECTION),
    ] = False,
) -> Selection:
    """Which chunks the options mean.

    A salt goes to the controller only where a prefix needs it; its id is enough elsewhere.

    Raises:
        ConfigError: none or several ways to say it, or values that can't be.
    """
    ways = [name for name, given in _ways(tokens, text, keys, everything) if given]
    salt = _salt(tenant, tenant_file, use_variable=not tenant_id and ways != ["--keys"])
    if salt is not None and tenant_id:
        raise ConfigError("a tenant and --tenant-id", hint="give one of them")
    anyone = salt is None and not tenant_id
    if len(ways) > 1:
        raise ConfigError(" and ".join(ways) + " at once", hint="give one of them")
    if not ways and anyone and not model:
        raise ConfigError(
            "which chunks?",
            hint="give --tokens, --text or --keys, or --model, a tenant, or --all",
        )
    if ways and ways[0] in ("--keys", "--all") and (model or not anyone):
        raise ConfigError(f"{ways[0]} has no --model and no tenant", hint="give one of them")
    prefix = bool(tokens or text)
    if prefix and tenant_id:
        raise ConfigError(
            "a prefix needs the tenant's salt, not its id",
            hint=f"--tenant-file FILE, or {TENANT_VARIABLE}",
        )
    if lora and not prefix:
        raise ConfigError("--lora is for prefixes", hint="give --tokens or --text too")
    given: dict[str, Any] = {"model": model, "lora": lora, "all": everything}
    if tokens:
        given["tokens"] = _token_ids(read_input(tokens, "--tokens"))
    if text:
        given["text"] = read_input(text[1:], "--text") if text.startswith("@") else text
    if keys:
        listed = read_input(keys[1:], "--keys") if keys.startswith("@") else keys
        given["keys"] = listed.replace(",", " ").split()
    if salt and not prefix:
        tenant_id = id_of(salt)
    elif salt is not None:
        given["tenant"] = salt
    return make(Selection, given | ({"tenant_id": tenant_id} if tenant_id else {}))


def of_prefix(select: Selection) -> Selection:
    """``select``, which is of a prefix or of keys.

    Raises:
        ConfigError: it is of anything else.
    """
    if not (select.tokens or select.text or select.keys):
        raise ConfigError("which prefix?", hint="give --tokens, --text or --keys")
    return select


def tenant_of(tenant: str | None, tenant_file: str, tenant_id: str) -> dict[str, str]:
    """``tenant`` or ``tenant_id``, whichever says who is meant; nothing when nobody is.

    Raises:
        ConfigError: both, or a file that can't be read.
    """
    salt = _salt(tenant, tenant_file, use_variable=not tenant_id)
    if salt is not None and tenant_id:
        raise ConfigError("a tenant and --tenant-id", hint="give one of them")
    if salt:
        return {"tenant_id": id_of(salt)}
    if salt is not None:
        return {"tenant": salt}
    return {"tenant_id": tenant_id} if tenant_id else {}


def place(text: str) -> Place:
    """Of ``INSTANCE/TIER``.

    Raises:
        ConfigError: it is something else.
    """
    instance, slash, tier = text.partition("/")
    if not slash:
        raise ConfigError(f"{text!r} is no INSTANCE/TIER", hint="like engine-0/host")
    return make(Place, {"instance": instance, "tier": tier})


def make(kind: type[S], values: dict[str, Any]) -> S:
    """``kind`` of ``values``.

    Raises:
        ConfigError: a value that it can't have; the message doesn't show it.
    """
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"wrong option: {error}", hint="see --help") from error


def read_input(name: str, option: str) -> str:
    """The text in a file, or of stdin when ``name`` is ``-``.

    Raises:
        ConfigError: it can't be read, is empty, or has more than `MAX_INPUT_BYTES`.
    """
    try:
        if name == "-":
            content = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
        else:
            with open(name, "rb") as opened:
                content = opened.read(MAX_INPUT_BYTES + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}: {name} can't be read: {error}", hint="name a file") from error
    if len(content) > MAX_INPUT_BYTES:
        raise ConfigError(f"{option}: {name} is larger than {MAX_INPUT_BYTES >> 20} MiB")
    if not text.strip():
        raise ConfigError(f"{option}: {'stdin' if name == '-' else name} is empty")
    return text


def _ways(tokens: str, text: str, keys: str, everything: bool) -> list[tuple[str, bool]]:
    return [
        ("--tokens", bool(tokens)),
        ("--text", bool(text)),
        ("--keys", bool(keys)),
        ("--all", everything),
    ]


def _salt(tenant: str | None, tenant_file: str, *, use_variable: bool) -> str | None:
    if tenant is not None and tenant_file:
        raise ConfigError("--tenant and --tenant-file", hint="give one of them")
    if tenant_file:
        return read_input(tenant_file, "--tenant-file").rstrip("\r\n")
    if tenant is None and use_variable:
        return os.environ.get(TENANT_VARIABLE) or None
    return tenant


def _token_ids(text: str) -> list[int]:
    """Of a JSON list, or numbers between blanks."""
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else list(map(int, text.split()))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            "--tokens: not token ids", hint="[1, 2, 3], or 1 2 3, as a tokenizer gives them"
        ) from error
    return found if isinstance(found, list) else [found]
