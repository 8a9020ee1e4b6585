"""What an instance and a controller say to each other: msgpack bodies of ``POST /v1/sync``.

An instance asks; the answer has what it is to do.  It says what its tiers hold as numbered changes,
so a controller notices a gap and asks for all of it again.  An order is carried out once by each
process: it may come again until its end was told, from any controller.

Chunks travel as their 46-byte stored keys, joined.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from lmcache_core.keys import STORED_KEY_BYTES, TAG_BYTES
from lmcache_core.layout import LayoutSpec

VERSION = 1
PATH = "/v1/sync"
WHERE_PATH = "/v1/where"
CONTENT_TYPE = "application/msgpack"
MAX_BODY_BYTES = 8 << 20
MAX_KEYS = 65_536
"""In one order, or one change."""
MAX_CHANGES = 4096
MAX_TIERS = 8
MAX_TEXT = 1024
MAX_TOKENS = 1 << 20
MAX_ORDERS = 256
"""Known to an instance at the same time."""
MAX_NAMESPACES = 1024
"""In one sync; further ones come with the next."""
MAX_TOP = 32
MAX_COUNTERS = 1024

Number = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Ident = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
"""Of instances, orders, questions, owners."""
TierName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")]
Tag = Annotated[bytes, Meta(min_length=TAG_BYTES, max_length=TAG_BYTES)]
Keys = Annotated[bytes, Meta(max_length=MAX_KEYS * STORED_KEY_BYTES)]
Suffix = Annotated[bytes, Meta(min_length=6, max_length=6)]
Kind = Literal["embedded", "node", "engine"]
"""``embedded``: an engine with its cache; ``node``: a node server; ``engine``: one whose cache a
node server holds: it has identities, a tokenizer and requests, but no chunks."""


def tenant_id(salt: str | None) -> str:
    """What stands for a request's ``cache_salt`` everywhere: salts are secrets.  "" is no salt."""
    return "" if salt is None else hashlib.sha256(salt.encode()).hexdigest()[:16]


class ChunkKind(msgspec.Struct, frozen=True, array_like=True):
    """One kind of chunk of a model: the end of its keys, and what its bytes are."""

    suffix: Suffix
    layout: LayoutSpec


class Model(msgspec.Struct, frozen=True, array_like=True):
    """What an engine serves, so that a controller can make keys of tokens.

    Attributes:
        name: as served.
        pairs: of the engine's `lmcache_core.keys.Namespace`, which no tenant is part of.
        kinds: the first has a chunk for every prefix.
    """

    name: Text
    tag: Tag
    pairs: Annotated[tuple[tuple[bytes, bytes], ...], Meta(max_length=256)]
    chunk_size: Annotated[int, Meta(gt=0, le=1 << 20)]
    hash_algorithm: Literal["sha256", "blake3"]
    kinds: Annotated[tuple[ChunkKind, ...], Meta(min_length=1, max_length=4)]


class NamespaceNote(msgspec.Struct, frozen=True, array_like=True):
    """A namespace that an engine has used.

    Attributes:
        base: tag of its `Model`.
        tenant: see `tenant_id`.
        lora: content digest of the adapter, or "".
    """

    tag: Tag
    base: Tag
    tenant: Annotated[str, Meta(pattern=r"^([0-9a-f]{16})?$")] = ""
    lora: Text = ""


class Change(msgspec.Struct, frozen=True, array_like=True):
    """``keys`` are in tier number ``tier`` now, or no longer."""

    tier: Annotated[int, Meta(ge=0, lt=MAX_TIERS)]
    present: bool
    keys: Keys


class Share(msgspec.Struct, frozen=True, array_like=True):
    """What one namespace takes of a tier."""

    tag: Tag
    chunks: Number
    nbytes: Number


class TierStatus(msgspec.Struct, frozen=True, array_like=True):
    """One tier now.

    Attributes:
        url: without secrets; "" for host.
        capacity_bytes: 0 is no limit of ours.
        available: False behind an open breaker, for ``reason``.
        pinned_bytes: that eviction leaves alone.
        shares: the largest, at most `MAX_NAMESPACES`.
        writable: whether orders may store there.
    """

    name: TierName
    url: Text
    used_bytes: Number
    capacity_bytes: Number
    available: bool
    reason: Text = ""
    pinned_bytes: Number = 0
    writable: bool = True
    shares: Annotated[tuple[Share, ...], Meta(max_length=MAX_NAMESPACES)] = ()


class TopPrefix(msgspec.Struct, frozen=True, array_like=True):
    """A prefix that saved prefill: the key of its first chunk, tokens that were loaded for requests
    which begin with it, and how many such requests there were."""

    key: Annotated[bytes, Meta(min_length=STORED_KEY_BYTES, max_length=STORED_KEY_BYTES)]
    saved_tokens: Number
    requests: Number
    chunks: Number


class Status(msgspec.Struct, frozen=True, array_like=True):
    """What an instance is and does now.

    Attributes:
        version: of lmcache-core.
        backends: distribution -> version, of those that its tiers use.
        tiers: host first; a change's ``tier`` counts them.  None for kind ``engine``.
        channel: where peers reach it, or "".
        node: of kind ``engine``: the incarnation of its node server.
        counters: dotted name -> value, since the process began (`lmcache_core.metrics`).
        top: prefixes by saved tokens, most first.
        tokenizer: whether it answers `Tokenize`.
    """

    version: Text
    pid: Number
    uptime_s: float
    backends: Annotated[dict[str, str], Meta(max_length=64)] = {}
    tiers: Annotated[tuple[TierStatus, ...], Meta(max_length=MAX_TIERS)] = ()
    channel: Text = ""
    node: Text = ""
    counters: Annotated[dict[str, int], Meta(max_length=MAX_COUNTERS)] = {}
    top: Annotated[tuple[TopPrefix, ...], Meta(max_length=MAX_TOP)] = ()
    tokenizer: bool = False


# Orders: what a controller wants done.  Each has an id that is never used for another.


class _Order(msgspec.Struct, frozen=True, kw_only=True, tag_field="op"):
    """Attributes: id."""

    id: Ident


class Clear(_Order, frozen=True, kw_only=True, tag="clear"):
    """Delete chunks, also those that are being stored: none that was here when the order arrived
    is served after its end.  Pins of them end.

    Attributes:
        tiers: names; none means all.
        tags: of namespaces; None takes all.
        keys: only these of them; None takes all.
    """

    tiers: tuple[TierName, ...] = ()
    tags: tuple[Tag, ...] | None = None
    keys: Keys | None = None


class Pin(_Order, frozen=True, kw_only=True, tag="pin"):
    """Keep ``keys`` in ``tier`` until ``until_s`` (Unix time), bringing to host what is not there
    when ``tier`` is ``host``.

    Attributes:
        pin: its name; a second order with it replaces the first.
        kinds: layouts of the keys, by suffix.
    """

    pin: Ident
    tier: TierName
    keys: Keys
    until_s: float
    kinds: tuple[ChunkKind, ...]


class Unpin(_Order, frozen=True, kw_only=True, tag="unpin"):
    """End a pin; an unknown one is fine."""

    pin: Ident


class Copy(_Order, frozen=True, kw_only=True, tag="copy"):
    """Have ``keys``, which are in ``source``, in ``target`` too.

    Attributes:
        source: a tier's name; with ``peer``, ignored.
        peer: address of another instance's channel, whose host tier is read instead; or "".
        pin: hold what comes to host under this name until an `Unpin` of it, at most 600 s; or "".
        chained: the keys of each kind are a prefix, in order.
    """

    source: TierName
    target: TierName
    keys: Keys
    kinds: tuple[ChunkKind, ...]
    peer: Text = ""
    pin: Annotated[str, Meta(max_length=128)] = ""
    chained: bool = False


class Recode(_Order, frozen=True, kw_only=True, tag="recode"):
    """Have ``keys``, or all of ``tags``, stored in ``tier`` in another form; ``codec`` "" is as
    they are."""

    tier: TierName
    codec: Text
    level: Text = ""
    keys: Keys | None = None
    tags: tuple[Tag, ...] = ()
    kinds: tuple[ChunkKind, ...]


Order = Clear | Pin | Unpin | Copy | Recode


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How an order fares.

    Attributes:
        total, settled: chunks; ``total`` may grow.
        nbytes: that were moved, deleted or pinned.
        errors: reason -> chunks.
        error: why it failed as a whole, or "".
        held: of `Copy` and `Pin`: the keys that are where they were wanted, once it is done.
        notes: other counts, such as ``before_bytes`` and ``after_bytes`` of `Recode`.
    """

    id: Ident
    state: Literal["running", "done", "failed", "cancelled"]
    total: Number = 0
    settled: Number = 0
    nbytes: Number = 0
    errors: Annotated[dict[str, int], Meta(max_length=64)] = {}
    error: Text = ""
    held: Keys = b""
    notes: Annotated[dict[str, int], Meta(max_length=16)] = {}


# Questions: answered once, by who was asked, to who asked.


class Tokenize(msgspec.Struct, frozen=True, kw_only=True, tag_field="ask", tag="tokenize"):
    """Token ids of ``text``, as a prompt of the model has them."""

    id: Ident
    text: Annotated[str, Meta(max_length=4 << 20)]


class Explain(msgspec.Struct, frozen=True, kw_only=True, tag_field="ask", tag="explain"):
    """Why chunks of a request missed."""

    id: Ident
    request_id: Annotated[str, Meta(max_length=256)]


Question = Tokenize | Explain


class MissRow(msgspec.Struct, frozen=True, array_like=True):
    """One chunk of a request.

    Attributes:
        reason: "" when it was loaded or on the device; else ``never_stored``, ``evicted``,
            ``identity.FIELD``, ``deadline``, ``breaker``, ``corrupt``, ``not_needed`` (after a
            gap).
        detail: such as the tier, and the policy that evicted it.
        at_s: Unix time of that, or 0.
    """

    index: Number
    key: bytes
    reason: Text
    detail: Text = ""
    at_s: float = 0.0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """To a question; ``error`` says why there is none."""

    id: Ident
    error: Text = ""
    tokens: Annotated[list[int], Meta(max_length=MAX_TOKENS)] = []
    misses: Annotated[list[MissRow], Meta(max_length=MAX_KEYS)] = []
    found: bool = False


class Limit(msgspec.Struct, frozen=True, array_like=True):
    """Most bytes that namespace ``tag`` may take of each tier named; "*" is every tier."""

    tag: Tag
    tier: Text
    nbytes: Number


class Sync(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance says.

    Attributes:
        instance, kind: who it is; ``incarnation`` is new in each process.
        seq: number of the first change; they are numbered from 1 on.
        reset: forget what it said before: the changes are all that it has.
        more: of a ``reset``: the next sync goes on with it (``reset`` False, ``seq`` goes on).
        namespaces, models: new ones; all of them when ``reset``.
        limits_version: of the limits that it keeps.
        wait_s: how long the answer may wait for something to do.
    """

    version: int
    instance: Ident
    incarnation: Ident
    kind: Kind
    seq: Number
    reset: bool = False
    more: bool = False
    changes: Annotated[tuple[Change, ...], Meta(max_length=MAX_CHANGES)] = ()
    models: Annotated[tuple[Model, ...], Meta(max_length=64)] = ()
    namespaces: Annotated[tuple[NamespaceNote, ...], Meta(max_length=MAX_NAMESPACES)] = ()
    status: Status | None = None
    progress: Annotated[tuple[Progress, ...], Meta(max_length=MAX_ORDERS)] = ()
    answers: Annotated[tuple[Answer, ...], Meta(max_length=64)] = ()
    limits_version: Text = ""
    wait_s: Annotated[float, Meta(ge=0, le=30)] = 0.0


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What a controller says.

    Attributes:
        controller: new in each of its processes.
        resync: what it knows has a gap: say all, with ``reset``.
        orders: to be carried out, unless known.
        cancel: ids of orders that are not wanted any more.
        recorded: ids of orders whose end was noted: need not be told again.
        limits: all that hold, when ``limits_version`` is not the instance's.
    """

    controller: Text
    resync: bool = False
    orders: tuple[Order, ...] = ()
    cancel: tuple[str, ...] = ()
    recorded: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    limits_version: Text = ""
    limits: tuple[Limit, ...] | None = None


class WhereRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /v1/where``: which peers have ``keys`` in their host tier?"""

    instance: Ident
    keys: Keys


class WhereReply(msgspec.Struct, frozen=True, kw_only=True):
    """Channel addresses, and for each key the number of one of them, or -1."""

    peers: tuple[str, ...]
    holder: tuple[int, ...]


def join(keys: list[bytes] | tuple[bytes, ...]) -> bytes:
    """Keys as they travel."""
    return b"".join(keys)


def split(joined: bytes) -> list[bytes]:
    """The reverse of `join`.

    Raises:
        ValueError: no whole number of keys.
    """
    if len(joined) % STORED_KEY_BYTES:
        raise ValueError(f"{len(joined)} bytes are no whole number of keys")
    return [joined[at : at + STORED_KEY_BYTES] for at in range(0, len(joined), STORED_KEY_BYTES)]
