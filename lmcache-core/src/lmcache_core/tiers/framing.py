"""The envelope's header of a chunk in host, written by whoever first sends the chunk on."""

from __future__ import annotations

from lmcache_core import envelope
from lmcache_core.tiers.host import HostChunk


def frame(chunk: HostChunk, slot: memoryview) -> None:
    """Write the header of the pinned ``chunk`` into its ``slot``, unless it is there.
    Thread-safe."""
    with chunk.frame_lock:
        if not chunk.framed:
            envelope.seal(
                slot,
                key=chunk.key,
                layout=chunk.layout.fingerprint,
                payload_bytes=chunk.payload_bytes,
            )
            chunk.framed = True
