"""What engines say to each other over a channel: msgpack, by name, of limited size."""

from __future__ import annotations

import msgspec

MAX_OFFER_KEYS = 128
"""Chunks named in one message, so that it fits a notification."""


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all; the tag is the class's name."""


class Ready(_Message, frozen=True, tag=True):
    """Prefiller: I compute the prompt of ``transfer``.  ``identity`` says what my chunks are."""

    transfer: str
    identity: dict[str, str]


class Offer(_Message, frozen=True, tag=True):
    """Decoder: these chunks of ``transfer`` I lack; ``tickets`` let you write each one."""

    transfer: str
    keys: list[bytes]
    tickets: list[bytes]
    last: bool


class Refuse(_Message, frozen=True, tag=True):
    """Decoder: I take nothing for ``transfer``."""

    transfer: str
    reason: str


class Stop(_Message, frozen=True, tag=True):
    """Decoder: I want no more for ``transfer``."""

    transfer: str


class Pushed(_Message, frozen=True, tag=True):
    """Prefiller, as the notification of a write: this chunk is there."""

    transfer: str
    key: bytes


class End(_Message, frozen=True, tag=True):
    """Prefiller: of ``transfer`` so many chunks were written, and no more will come."""

    transfer: str
    pushed: int


class Ask(_Message, frozen=True, tag=True):
    """Which of these chunks do you have in host memory?  Without keys: are you there?"""

    ask: int
    keys: list[bytes]


class Have(_Message, frozen=True, tag=True):
    """Answer of `Ask`: one bool a key."""

    ask: int
    present: list[bool]


class Borrow(_Message, frozen=True, tag=True):
    """Let me read these chunks."""

    ask: int
    keys: list[bytes]


class Lent(_Message, frozen=True, tag=True):
    """Answer of `Borrow`: number of each key that can be read, as the spans of the grant."""

    ask: int
    ticket: bytes
    lent: list[int]
    nbytes: list[int]


class Return(_Message, frozen=True, tag=True):
    """I read what was `Lent` for ``ask``, or want it no more."""

    ask: int


Message = Ready | Offer | Refuse | Stop | Pushed | End | Ask | Have | Borrow | Lent | Return

_decoder = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """``message`` as bytes."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """The message.

    Raises:
        msgspec.DecodeError: it is none.
    """
    found: Message = _decoder.decode(data)
    return found
