"""What ``nixl+ucx://`` says over its link: frames, tickets, and who a process is.

Everything is a fixed struct; what does not fit one is refused as a whole.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from lmcache_core.sdk import Access

META, HAVE, READY, POKE, NOTIFY, REVOKE, REVOKED, BYE, QUIET = range(1, 10)
"""Kinds of frames.  META: our agent as NIXL describes it, again after each registration; HAVE:
yours is loaded; READY: we have read from your memory, so the path stands; POKE: transfers need
your processor now; NOTIFY; REVOKE and its answer REVOKED; BYE: no more transfers, no more
notifications; QUIET: none of ours runs any more, and none will."""

NONCE_BYTES = 16
_META = struct.Struct("<16sIQ")  # nonce, sequence, address of the doormat
_HAVE = struct.Struct("<Id")  # sequence, our clock
_REVOKE = struct.Struct("<Qd")  # number, seconds of lease left
_NUMBER = struct.Struct("<Q")
_TICKET = struct.Struct("<8s16sQdIBBH")  # magic, nonce, number, end, sequence, access, kind, spans
_SPAN = struct.Struct("<QQ")
_MAGIC = b"nixlgrnt"
_MAC_BYTES = 16
_ACCESS = {1: Access.READ, 2: Access.WRITE}
_CODES = {access: code for code, access in _ACCESS.items()}
MAX_HELLO_FIELD = 128


class Malformed(Exception):
    """Raised by readers of this module: not what it should be."""


class Meta(NamedTuple):
    """Of a META frame: ``nonce`` names this connection's grants, ``sequence`` grows with each
    registration, ``doormat`` is the address of 8 bytes that everyone may read."""

    nonce: bytes
    sequence: int
    doormat: int
    agent: bytes


class Ticket(NamedTuple):
    """What a grant's ticket says.  ``until_s`` is on the owner's clock; ``spans`` are (address,
    bytes); ``sequence`` is of the META that tells of their registration."""

    number: int
    until_s: float
    sequence: int
    access: Access
    kind: int
    spans: tuple[tuple[int, int], ...]


def pack_meta(meta: Meta) -> bytes:
    """The payload of a META frame."""
    return _META.pack(meta.nonce, meta.sequence, meta.doormat) + meta.agent


def read_meta(payload: bytes) -> Meta:
    """Its inverse; raises `Malformed`."""
    if len(payload) <= _META.size:
        raise Malformed("META")
    nonce, sequence, doormat = _META.unpack_from(payload)
    return Meta(nonce, sequence, doormat, payload[_META.size :])


def pack_have(sequence: int, now_s: float) -> bytes:
    """The payload of a HAVE frame."""
    return _HAVE.pack(sequence, now_s)


def read_have(payload: bytes) -> tuple[int, float]:
    """Its inverse; raises `Malformed`."""
    sequence, now_s = _unpack(_HAVE, payload)
    return int(sequence), _finite(now_s)


def pack_revoke(number: int, left_s: float) -> bytes:
    """The payload of a REVOKE frame."""
    return _REVOKE.pack(number, left_s)


def read_revoke(payload: bytes) -> tuple[int, float]:
    """Its inverse; raises `Malformed`."""
    number, left_s = _unpack(_REVOKE, payload)
    return int(number), _finite(left_s)


def pack_number(number: int) -> bytes:
    """The payload of a REVOKED frame."""
    return _NUMBER.pack(number)


def read_number(payload: bytes) -> int:
    """Its inverse; raises `Malformed`."""
    return int(_unpack(_NUMBER, payload)[0])


def pack_ticket(secret: bytes, nonce: bytes, ticket: Ticket) -> bytes:
    """A ticket that is worth something on the connection of ``nonce`` only."""
    head = _TICKET.pack(
        _MAGIC, nonce, ticket.number, ticket.until_s, ticket.sequence,
        _CODES[ticket.access], ticket.kind, len(ticket.spans),
    )  # fmt: skip
    body = head + b"".join(_SPAN.pack(*span) for span in ticket.spans)
    return body + _seal(secret, body)


def read_ticket(secret: bytes, nonce: bytes, packed: bytes) -> Ticket:
    """What `pack_ticket` packed; raises `Malformed` for every other bytes, also for those of
    another connection."""
    body, seal = packed[:-_MAC_BYTES], packed[-_MAC_BYTES:]
    if len(body) < _TICKET.size or not hmac.compare_digest(seal, _seal(secret, body)):
        raise Malformed("ticket")
    magic, owner, number, until_s, sequence, access, kind, count = _TICKET.unpack_from(body)
    whole = len(body) == _TICKET.size + count * _SPAN.size
    if magic != _MAGIC or owner != nonce or access not in _ACCESS or not whole:
        raise Malformed("ticket")
    spans = tuple(_SPAN.iter_unpack(body[_TICKET.size :]))
    return Ticket(number, _finite(until_s), sequence, _ACCESS[access], kind, spans)


def span_bytes(count: int) -> int:
    """Size of a ticket of so many spans."""
    return _TICKET.size + count * _SPAN.size + _MAC_BYTES


@dataclass(frozen=True, slots=True)
class Identity:
    """Which process a channel lives in, and its NIXL agent.

    Attributes:
        agent: name of the agent; random.
        boot: of the kernel that runs now; "" when it does not say.
        pid_space: number of the PID namespace.
        pid, started: the process, and when it was started, in the kernel's ticks.
    """

    agent: str
    boot: str
    pid_space: str
    pid: int
    started: int

    @classmethod
    def of_this_process(cls, agent: str) -> Identity:
        """Ours."""
        pid = os.getpid()
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return cls(agent, boot, os.readlink("/proc/self/ns/pid"), pid, _started(pid))
        except (OSError, ValueError, IndexError):
            return cls(agent, "", "", pid, 0)

    @classmethod
    def read(cls, hello: bytes) -> Identity:
        """Of a peer's hello; raises `Malformed`."""
        try:
            found = json.loads(hello)
            identity = cls(**found)
        except (ValueError, TypeError, RecursionError) as error:
            raise Malformed("hello") from error
        texts = (identity.agent, identity.boot, identity.pid_space)
        numbers = (identity.pid, identity.started)
        if not all(isinstance(text, str) and len(text) <= MAX_HELLO_FIELD for text in texts):
            raise Malformed("hello")
        if not all(type(number) is int for number in numbers) or not identity.agent:
            raise Malformed("hello")
        return identity

    def pack(self) -> bytes:
        """As a hello."""
        return json.dumps(asdict(self)).encode()

    def surely_dead(self, ours: Identity) -> bool:
        """Whether the process has ended for certain: it was on our host, where we can look."""
        if not self.boot or (self.boot, self.pid_space) != (ours.boot, ours.pid_space):
            return False
        try:
            if _started(self.pid) != self.started:
                return True
            # A zombie's other threads may run on.
            tasks = os.listdir(f"/proc/{self.pid}/task")
            return all(_state(f"/proc/{self.pid}/task/{task}/stat") in "ZX" for task in tasks)
        except (FileNotFoundError, ProcessLookupError):
            return True
        except (OSError, ValueError, IndexError):
            return False


def rows_inside(
    spans: Sequence[tuple[int, int]], span: int, offset: int, nbytes: int
) -> int | None:
    """Address of ``nbytes`` from ``offset`` on in a span; None when they are not inside."""
    if not 0 <= span < len(spans):
        return None
    address, size = spans[span]
    return address + offset if 0 <= offset <= size - nbytes else None


def _stat(path: str) -> list[str]:
    # The second field is the program's name in parentheses, which may hold anything.
    return Path(path).read_text(errors="replace").rpartition(")")[2].split()


def _state(path: str) -> str:
    return _stat(path)[0]


def _started(pid: int) -> int:
    return int(_stat(f"/proc/{pid}/stat")[19])


def _seal(secret: bytes, body: bytes) -> bytes:
    return hmac.new(secret, b"grant" + body, hashlib.sha256).digest()[:_MAC_BYTES]


def _unpack(form: struct.Struct, payload: bytes) -> tuple[float, ...]:
    if len(payload) != form.size:
        raise Malformed("frame")
    return form.unpack(payload)


def _finite(value: float) -> float:
    if value != value or value in (float("inf"), float("-inf")):
        raise Malformed("a time that is none")
    return float(value)
