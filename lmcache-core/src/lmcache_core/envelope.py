"""The header of every chunk stored below the host tier.

A stored chunk is one contiguous slot: 4 KiB of header, the payload, zeros up to a multiple
of 4 KiB.  Header, little-endian: magic, format, lengths, block size, full key, layout
fingerprint, codec name, number of block sums, the sums (xxh3-64 per payload block, so
that blocks can be checked in parallel), and last an xxh3-64 of everything before it.
"""

from __future__ import annotations

import struct

import xxhash

from lmcache_core.sdk import ConfigError

HEADER_BYTES = 4096
ALIGNMENT = 4096
MAX_BLOCKS = 256
_MIN_BLOCK_BYTES = 1 << 20
_MAGIC = b"LMCCHNK\x01"
_FORMAT = 1
_FIXED = struct.Struct("<8sHBBI QQ 64s 32s 32s I")
_FIXED_BYTES = _FIXED.size
_SUM_AT = HEADER_BYTES - 8


def stored_bytes(payload_bytes: int) -> int:
    """Bytes of a slot: header and payload, padded to 4 KiB."""
    return HEADER_BYTES + -(-payload_bytes // ALIGNMENT) * ALIGNMENT


def block_bytes(payload_bytes: int) -> int:
    """Smallest power of two, at least 1 MiB, that cuts the payload into 256 blocks."""
    size = _MIN_BLOCK_BYTES
    while size * MAX_BLOCKS < payload_bytes:
        size *= 2
    return size


def seal(
    slot: memoryview, *, key: bytes, layout: bytes, payload_bytes: int, codec: str = ""
) -> None:
    """Write the header for the payload that is already in ``slot``, in place.

    Args:
        slot: writable, `stored_bytes` long or longer.
        key: 1 to 64 bytes.
        layout: fingerprint of the payload's layout, at most 32 bytes.
        codec: name of at most 32 ASCII bytes; "" when the payload is not encoded.

    Raises:
        ConfigError: a field does not fit.
    """
    total = stored_bytes(payload_bytes)
    name = codec.encode("ascii")
    if len(slot) < total or not 1 <= len(key) <= 64 or len(layout) > 32 or len(name) > 32:
        raise ConfigError("the envelope's fields do not fit", op="seal")
    size = block_bytes(payload_bytes)
    sums = _sums(slot, payload_bytes, size)
    header = bytearray(HEADER_BYTES)
    _FIXED.pack_into(
        header, 0, _MAGIC, _FORMAT, len(key), len(layout), size,
        payload_bytes, payload_bytes, key, layout, name, len(sums),
    )  # fmt: skip
    struct.pack_into(f"<{len(sums)}Q", header, _FIXED_BYTES, *sums)
    struct.pack_into("<Q", header, _SUM_AT, xxhash.xxh3_64_intdigest(header[:_SUM_AT]))
    slot[HEADER_BYTES + payload_bytes : total] = bytes(total - HEADER_BYTES - payload_bytes)
    slot[:HEADER_BYTES] = header


def verify(slot: memoryview, *, key: bytes, layout: bytes, stored_bytes: int) -> str:
    """Why the slot must not be served, or "" when every byte is as it was sealed.

    ``stored_bytes`` is how many bytes the store gave.  Reasons: ``length``, ``magic``,
    ``header_checksum``, ``format``, ``key``, ``layout``, ``codec``, ``payload_checksum``.
    Never raises on foreign bytes.
    """
    if stored_bytes < HEADER_BYTES or len(slot) < stored_bytes:
        return "length"
    header = bytes(slot[:HEADER_BYTES])
    if header[: len(_MAGIC)] != _MAGIC:
        return "magic"
    (header_sum,) = struct.unpack_from("<Q", header, _SUM_AT)
    if xxhash.xxh3_64_intdigest(header[:_SUM_AT]) != header_sum:
        return "header_checksum"
    fields = _FIXED.unpack_from(header)
    _, version, key_len, layout_len, size, payload_bytes, _, its_key, its_layout, name, count = (
        fields
    )
    if version != _FORMAT:
        return "format"
    if its_key[:key_len] != key:
        return "key"
    if its_layout[:layout_len] != layout:
        return "layout"
    if name.rstrip(b"\0"):
        return "codec"
    if _total(payload_bytes) != stored_bytes or size != block_bytes(payload_bytes):
        return "length"
    sums = struct.unpack_from(f"<{count}Q", header, _FIXED_BYTES) if count <= MAX_BLOCKS else ()
    if list(sums) != _sums(slot, payload_bytes, size):
        return "payload_checksum"
    return ""


_total = stored_bytes


def _sums(slot: memoryview, payload_bytes: int, size: int) -> list[int]:
    payload = slot[HEADER_BYTES : HEADER_BYTES + payload_bytes]
    return [
        xxhash.xxh3_64_intdigest(payload[at : at + size]) for at in range(0, payload_bytes, size)
    ]
