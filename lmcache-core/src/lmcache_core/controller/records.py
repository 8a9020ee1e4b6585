"""What the state's documents hold, by kind."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from lmcache_core.agent import wire
from lmcache_core.controller.messages import JobKind

PartState = Literal["waiting", "running", "done", "failed", "cancelled"]
ENDED = frozenset({"done", "failed", "cancelled"})


class PartRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One order to one instance, and how it fares.

    Attributes:
        order: id of its document of kind ``order``.
        after: numbers of parts that must have ended; all are lower.
        needs: those of them that must be done.
        keys_of: its order gets the keys that this part held; -1: it has its own.
        cleanup: carried out however the parts before it ended, also when the job is cancelled.
        incarnation: of the instance when it last told of it.
        held: chunks in its document of kind ``held``.
    """

    instance: str
    op: str
    order: str
    after: tuple[int, ...] = ()
    needs: tuple[int, ...] = ()
    keys_of: int = -1
    cleanup: bool = False
    state: PartState = "waiting"
    incarnation: str = ""
    total: int = 0
    settled: int = 0
    nbytes: int = 0
    errors: dict[str, int] = {}
    error: str = ""
    held: int = 0
    notes: dict[str, int] = {}


class JobRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job; times are Unix seconds.

    Attributes:
        until_s: what has not ended by then has failed.
        cancelled: somebody asked for that.
    """

    id: str
    kind: JobKind
    made_s: float
    until_s: float
    parts: tuple[PartRecord, ...]
    ended_s: float | None = None
    cancelled: bool = False
    pin: str = ""


class PinRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A pin.

    Attributes:
        order: id of the document with the order that instances get; its id is replaced.
        nbytes: of its chunks, at all instances.
        told: instance -> incarnation that has had the order.
    """

    id: str
    owner: str
    instances: tuple[str, ...]
    tier: str
    model: str
    chunks: int
    nbytes: int
    made_s: float
    until_s: float
    job: str
    order: str
    told: dict[str, str] = {}


class QuotaRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A limit; ``tenant_id`` "" is requests without a salt, ``tier`` "*" every tier."""

    id: str
    tenant_id: str
    tier: str
    nbytes: int


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An instance, or a controller, was alive."""

    name: str
    kind: str = ""
    incarnation: str = ""


class AnswerRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an idempotency key stands for; ``status`` 0: the answer is not known yet.

    Attributes:
        request: digest of the first request.
        seed: of the ids of what it makes.
    """

    request: str
    seed: bytes
    status: int = 0
    body: bytes = b""


WATCHED: dict[str, Any] = {
    "job": JobRecord,
    "pin": PinRecord,
    "quota": QuotaRecord,
    "model": wire.Model,
    "namespace": wire.NamespaceNote,
    "lease": LeaseRecord,
    "controller": LeaseRecord,
}
"""Kinds that every controller has in memory.  Others are ``order``, ``held`` and ``answer``."""
