"""What the controller's HTTP API takes and gives, as JSON.  `lmcache_core.controller.openapi` makes
the OpenAPI document of these types; unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from lmcache_core.agent.wire import Ident, TierName

MAX_PROMPT_TOKENS = 1 << 20
MAX_KEYS = 65_536
MAX_TTL_S = 30 * 86400.0

KeyHex = Annotated[str, Meta(pattern="^[0-9a-f]{92}$", description="A stored key, in hex.")]
TenantId = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
Text = Annotated[str, Meta(max_length=1024)]
Salt = Annotated[str, Meta(max_length=1024, description="A tenant's cache_salt.")]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 32)]
Seconds = Annotated[float, Meta(gt=0, le=MAX_TTL_S)]
JobState = Literal["running", "done", "failed", "cancelled"]
JobKind = Literal["clear", "pin", "unpin", "move", "copy", "compress", "decompress"]


class _In(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request's body."""


class _Out(msgspec.Struct, frozen=True, kw_only=True):
    """An answer's body."""


class Selection(_In, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which chunks are meant: one of ``tokens``, ``text``, ``keys``, or everything of ``model``,
    ``tenant``, both, or ``all``.

    Attributes:
        tokens: the chunks of this prefix.  Needs ``model`` when several are served.
        text: the same, through the tokenizer of an instance that serves the model.
        model: name of a model, as instances say it.
        tenant: a cache_salt; "" means requests without one; None any tenant, where everything of a
            model is meant, and no salt where a prefix is meant.
        tenant_id: instead of ``tenant``, as usage shows it; not for prefixes.
        lora: content digest of an adapter, for prefixes.
        all: everything.
    """

    tokens: Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_PROMPT_TOKENS)] | None = None
    text: Annotated[str, Meta(min_length=1, max_length=4 << 20)] | None = None
    keys: Annotated[list[KeyHex], Meta(min_length=1, max_length=MAX_KEYS)] | None = None
    model: Text = ""
    tenant: Salt | None = None
    tenant_id: TenantId | None = None
    lora: Text = ""
    all: bool = False


class Place(_In, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tier of an instance."""

    instance: Ident
    tier: TierName


class LookupRequest(_In, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``select`` is a prefix (tokens or text) or keys."""

    select: Selection


class TierHolding(_Out, frozen=True, kw_only=True):
    """How many of the prefix's chunks one tier has, of those that the instance has without a
    gap."""

    tier: str
    chunks: int
    tokens: int


class Holding(_Out, frozen=True, kw_only=True):
    """What one instance has of the prefix, without a gap from its start."""

    instance: str
    chunks: int
    tokens: int
    tiers: list[TierHolding]


class LookupReply(_Out, frozen=True, kw_only=True):
    """Longest first.

    Attributes:
        prompt_tokens: of the text or tokens asked for; 0 for keys.
        chunks: whole chunks of them.
        keys: of these chunks.
    """

    model: str
    chunk_size: int
    prompt_tokens: int
    chunks: int
    keys: list[str]
    instances: list[Holding]


class ClearRequest(_In, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``instances`` and ``tiers``: only there; empty is everywhere."""

    select: Selection
    instances: Annotated[list[Ident], Meta(max_length=1024)] = []
    tiers: Annotated[list[TierName], Meta(max_length=64)] = []


class PinRequest(_In, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keep a prefix in ``tier`` of ``instances`` (empty: of those that have some of it)."""

    select: Selection
    owner: Ident
    ttl_s: Seconds
    instances: Annotated[list[Ident], Meta(max_length=1024)] = []
    tier: TierName = "host"


class Pin(_Out, frozen=True, kw_only=True):
    """One pin.  ``chunks`` are of the prefix; ``instances`` hold it."""

    id: str
    owner: str
    instances: list[str]
    tier: str
    model: str
    chunks: int
    made_s: float
    until_s: float
    job: str


class MoveRequest(_In, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of ``move`` and ``copy``: the chunks of ``select`` that ``source`` has, to ``target``."""

    select: Selection
    source: Place
    target: Place


class RecodeRequest(_In, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of ``compress``, which needs a ``codec``, and ``decompress``."""

    select: Selection
    tier: TierName
    instances: Annotated[list[Ident], Meta(max_length=1024)] = []
    codec: Annotated[str, Meta(max_length=64)] = ""
    level: Annotated[str, Meta(max_length=64)] = ""


class Part(_Out, frozen=True, kw_only=True):
    """What one instance does for a job."""

    number: int
    instance: str
    op: str
    state: Literal["waiting", "running", "done", "failed", "cancelled"]
    after: list[int] = []
    total: int = 0
    settled: int = 0
    bytes: int = 0
    errors: dict[str, int] = {}
    error: str = ""
    notes: dict[str, int] = {}


class Job(_Out, frozen=True, kw_only=True):
    """A long operation.  Times are Unix seconds; ``ended_s`` is None while it runs.

    ``errors`` counts chunks by reason; ``error`` says why it failed as a whole."""

    id: str
    kind: JobKind
    state: JobState
    made_s: float
    ended_s: float | None = None
    total: int = 0
    settled: int = 0
    bytes: int = 0
    errors: dict[str, int] = {}
    error: str = ""
    parts: list[Part] = []
    pin: str = ""


class Jobs(_Out, frozen=True, kw_only=True):
    """Newest first."""

    jobs: list[Job]


class Pins(_Out, frozen=True, kw_only=True):
    """Those that have not ended."""

    pins: list[Pin]


class Tier(_Out, frozen=True, kw_only=True):
    """One tier of an instance.  ``capacity_bytes`` 0: no limit of ours."""

    name: str
    url: str
    used_bytes: int
    capacity_bytes: int
    pinned_bytes: int
    chunks: int
    available: bool
    reason: str
    writable: bool


class Rates(_Out, frozen=True, kw_only=True):
    """Of the last minute: tokens per second asked for, found and stored, and bytes per second read
    from and written to tiers below host."""

    requested_tokens: float = 0.0
    hit_tokens: float = 0.0
    stored_tokens: float = 0.0
    read_bytes: float = 0.0
    write_bytes: float = 0.0


class Instance(_Out, frozen=True, kw_only=True):
    """One cache, or an engine whose cache a node server holds.

    Attributes:
        state: ``live``; ``lost``, which has not spoken for the lease; ``resyncing``.
        node: of an engine: name of its node server, when that is known here.
        workers: of a node server: names of its engines.
    """

    name: str
    kind: Literal["embedded", "node", "engine"]
    state: Literal["live", "lost", "resyncing"]
    incarnation: str
    version: str
    backends: dict[str, str]
    pid: int
    uptime_s: float
    seen_s: float
    models: list[str]
    channel: str
    node: str
    workers: list[str]
    tiers: list[Tier]
    rates: Rates
    errors: dict[str, int] = {}


class Instances(_Out, frozen=True, kw_only=True):
    """By name."""

    instances: list[Instance]


class HealthReply(_Out, frozen=True, kw_only=True):
    """``problems`` are sentences: lost instances, open breakers, tiers without room."""

    status: Literal["ok", "degraded"]
    version: str
    uptime_s: float
    state: str
    instances: int
    chunks: int
    problems: list[str]
    controllers: list[str] = []


class Usage(_Out, frozen=True, kw_only=True):
    """What one namespace takes in one tier of one instance.  ``model`` "" is not known (any
    more)."""

    instance: str
    tier: str
    model: str
    tenant_id: str
    lora: str
    tag: str
    chunks: int
    bytes: int


class UsageReply(_Out, frozen=True, kw_only=True):
    """Largest first; ``truncated`` when instances had more namespaces than they told."""

    usage: list[Usage]
    truncated: bool = False


class QuotaRequest(_In, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Most bytes of a tenant in each tier named ``tier`` ("*": every tier) of every instance; one
    of ``tenant`` and ``tenant_id``."""

    bytes: Annotated[int, Meta(ge=0, le=1 << 60)]
    tenant: Salt | None = None
    tenant_id: TenantId | None = None
    tier: Annotated[str, Meta(pattern=r"^(\*|[A-Za-z0-9][A-Za-z0-9._+-]{0,63})$")] = "*"


class Quota(_Out, frozen=True, kw_only=True):
    """One limit."""

    id: str
    tenant_id: str
    tier: str
    bytes: int


class Quotas(_Out, frozen=True, kw_only=True):
    """All limits."""

    quotas: list[Quota]


class Miss(_Out, frozen=True, kw_only=True):
    """One chunk of a request; ``reason`` "" was not missed.  See docs/controller.md."""

    index: int
    key: str
    reason: str
    detail: str
    at_s: float | None


class Misses(_Out, frozen=True, kw_only=True):
    """Of one request."""

    request_id: str
    instance: str
    misses: list[Miss]


class Prefix(_Out, frozen=True, kw_only=True):
    """A prefix that saved prefill; ``key`` is of its first chunk, ``chunks`` its longest hit."""

    instance: str
    model: str
    tenant_id: str
    key: str
    chunks: int
    saved_tokens: int
    requests: int


class Prefixes(_Out, frozen=True, kw_only=True):
    """Most saved tokens first."""

    prefixes: list[Prefix]


class Sample(_Out, frozen=True, kw_only=True):
    """The whole fleet in one interval that ends at ``at_s``: tokens and bytes per second."""

    at_s: float
    hit_rate: float | None
    requested_tokens: float
    hit_tokens: float
    stored_tokens: float
    read_bytes: float
    write_bytes: float


class History(_Out, frozen=True, kw_only=True):
    """Oldest first; of what this controller has seen."""

    interval_s: float
    samples: list[Sample]


class ErrorBody(_Out, frozen=True, kw_only=True):
    """What went wrong: ``code`` for programs, ``message`` and ``hint`` for people."""

    code: str
    message: str
    hint: str = ""


class Problem(_Out, frozen=True, kw_only=True):
    """Every answer that is no success."""

    error: ErrorBody
