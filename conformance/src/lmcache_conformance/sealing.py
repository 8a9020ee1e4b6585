"""Values as core stores them: for stores that leave damage to core's envelope."""

from __future__ import annotations

from lmcache_core import envelope

_KEY, _LAYOUT = b"k" * 46, b"conformance"


def sealed(payload: bytes) -> bytes:
    """``payload`` in an envelope."""
    slot = bytearray(envelope.stored_bytes(len(payload)))
    slot[envelope.HEADER_BYTES : envelope.HEADER_BYTES + len(payload)] = payload
    envelope.seal(memoryview(slot), key=_KEY, layout=_LAYOUT, payload_bytes=len(payload))
    return bytes(slot)


def unseal(stored: bytes) -> bool:
    """Whether core would serve ``stored``."""
    verdict = envelope.verify(memoryview(bytearray(stored)), key=_KEY, layout=_LAYOUT)
    return verdict is envelope.Verdict.OK
