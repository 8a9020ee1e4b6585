"""The table of what can be asked: routing, validation and the OpenAPI document follow from it."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

JSON = "application/json"
IDEMPOTENCY_KEY = r"^[!-~]{1,128}$"
Token = Literal["none", "operator", "instance"]
SMALL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a handler gives; a Struct as ``body`` becomes JSON."""

    body: Any = b""
    status: int = 200
    media_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)

    def encoded(self) -> bytes:
        """The body as it is sent."""
        return self.body if isinstance(self.body, bytes) else msgspec.json.encode(self.body)


@dataclass(slots=True, kw_only=True)
class Call:
    """One request that may be carried out.

    Attributes:
        path, query: parameters.
        body: decoded; None without one.
        seed: of the ids of what it makes: the same request makes the same things once.
        gone: set when the client left.
    """

    path: Mapping[str, str]
    query: Mapping[str, Any]
    body: Any = None
    seed: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def new_id(self, kind: str) -> str:
        """An id for what it makes."""
        return f"{kind}-{hashlib.sha256(kind.encode() + self.seed).hexdigest()[:20]}"


Run = Callable[[Any, Call], Awaitable[Answer]]
"""A method of `lmcache_core.controller.api.Api`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One query parameter."""

    name: str
    type: Any
    default: Any
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path.

    Attributes:
        name: unique; OpenAPI's operationId.
        body: type of the request's body, or None.
        answer: type of the answer's body; None when it is no JSON.
        media_type: of the body and the answer.
        token: who may.
        makes: an Idempotency-Key is honoured.
        max_body_bytes: 0 takes the configured limit.
        waits: the client's leaving is watched.
        problems: statuses beside those that every operation of its kind has.
        example: of the body.
    """

    method: str
    path: str
    name: str
    text: str
    run: Run
    body: Any = None
    answer: Any = None
    status: int = 200
    media_type: str = JSON
    token: Token = "operator"
    query: tuple[Query, ...] = ()
    makes: bool = False
    max_body_bytes: int = 0
    waits: bool = False
    problems: tuple[int, ...] = ()
    example: Any = None

    @property
    def statuses(self) -> tuple[int, ...]:
        """Of every answer that is no success."""
        found = {421, 500, *self.problems}
        if self.token != "none":
            found |= {401, 503}
        if self.body is not None:
            found |= {400, 408, 413, 415}
        if self.body is not None or self.query:
            found.add(422)
        if "{" in self.path:
            found.add(404)
        return tuple(sorted(found))
