"""Header of every chunk stored below the host tier: proves that the bytes are the right ones.

A slot is ``[4096-byte header][payload][zeros up to a multiple of 4096]``, contiguous, so it
is written and read in one piece.  The payload has one checksum a block, so blocks can be
checked in parallel.  A checksum tells damage, not forgery.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import xxhash

from lmcache_core.sdk.connector import MAX_KEY_BYTES
from lmcache_core.sdk.errors import ContractViolation

HEADER_BYTES = 4096
FORMAT_VERSION = 1
MAX_BLOCKS = 256
MIN_BLOCK_BYTES = 1 << 20
MAX_CODEC_BYTES = 32
MAX_LAYOUT_BYTES = 32

_MAGIC = b"LMCCHUNK"
_TAG_BYTES = 8
# magic, format, sums, key/codec/layout lengths, pad, payload/raw/block bytes, namespace, key,
# codec, layout; then the sums; the header's own sum is its last 8 bytes.
_FIXED = struct.Struct("<8sHHBBBxQQQ8s64s32s32s")
_SUM = struct.Struct("<Q")
_SUM_AT = HEADER_BYTES - _SUM.size


class Verdict(str, enum.Enum):
    """What `verify` found.  Anything but OK is a miss."""

    OK = "ok"
    MAGIC = "magic"
    FORMAT = "format"
    HEADER_CHECKSUM = "header_checksum"
    KEY = "key"
    LAYOUT = "layout"
    CODEC = "codec"
    """Encoded otherwise than the reader decodes; the bytes may be whole."""
    LENGTH = "length"
    PAYLOAD_CHECKSUM = "payload_checksum"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A parsed header.

    Attributes:
        key: the whole stored key.
        namespace: its first 8 bytes, the namespace tag.
        payload_bytes: size as stored, after the codec.
        raw_bytes: size before the codec.
        codec: name of the codec, "" for none.
        layout: fingerprint of the KV layout, up to 32 bytes.
        block_bytes: size of the blocks that ``sums`` cover.
        sums: xxh3 (64 bit) of each block of the payload.
    """

    key: bytes
    namespace: bytes
    payload_bytes: int
    raw_bytes: int
    codec: str
    layout: bytes
    block_bytes: int
    sums: tuple[int, ...]


def stored_bytes(payload_bytes: int) -> int:
    """Size in bytes of the slot of a payload: the header and the payload, padded to 4096."""
    return HEADER_BYTES + (payload_bytes + 4095) // 4096 * 4096


def block_bytes_of(payload_bytes: int) -> int:
    """Smallest power of two from 1 MiB up that makes 256 blocks or fewer."""
    size = MIN_BLOCK_BYTES
    while size * MAX_BLOCKS < payload_bytes:
        size *= 2
    return size


def seal(
    slot: memoryview,
    *,
    key: bytes,
    layout: bytes,
    payload_bytes: int,
    codec: str = "",
    raw_bytes: int | None = None,
) -> None:
    """Write the header of the payload that lies at ``slot[4096:]``, and zero its padding.

    Args:
        slot: writable, at least ``stored_bytes(payload_bytes)`` bytes; bytes after those are
            left alone.
        key: the stored key, 1 to 64 bytes.
        layout: fingerprint, up to 32 bytes.
        payload_bytes: at least 1.
        codec: ASCII, up to 32 bytes.
        raw_bytes: size before the codec; ``payload_bytes`` when None.

    Raises:
        ContractViolation: an argument does not fit; nothing was touched.
    """
    name = codec.encode()
    end = stored_bytes(payload_bytes)
    fits = 1 <= len(key) <= MAX_KEY_BYTES and len(layout) <= MAX_LAYOUT_BYTES
    if not fits or len(name) > MAX_CODEC_BYTES or not codec.isascii():
        raise ContractViolation("key, layout or codec does not fit a header", op="seal")
    if payload_bytes < 1 or slot.nbytes < end or slot.readonly:
        raise ContractViolation(
            f"a payload of {payload_bytes} bytes in a slot of {slot.nbytes}", op="seal"
        )
    slot[HEADER_BYTES + payload_bytes : end] = bytes(end - HEADER_BYTES - payload_bytes)
    sums = _sums(slot, payload_bytes)
    raw = payload_bytes if raw_bytes is None else raw_bytes
    header = bytearray(HEADER_BYTES)
    _FIXED.pack_into(
        header,
        0,
        _MAGIC,
        FORMAT_VERSION,
        len(sums),
        len(key),
        len(name),
        len(layout),
        payload_bytes,
        raw,
        block_bytes_of(payload_bytes),
        key[:_TAG_BYTES],
        key,
        name,
        layout,
    )
    struct.pack_into(f"<{len(sums)}Q", header, _FIXED.size, *sums)
    _SUM.pack_into(header, _SUM_AT, xxhash.xxh3_64_intdigest(memoryview(header)[:_SUM_AT]))
    slot[:HEADER_BYTES] = header


def read_header(slot: memoryview) -> Header | Verdict:
    """The header at the start of ``slot``, or why there is none.  Never raises on bad bytes.

    The payload is not looked at.
    """
    if slot.nbytes < HEADER_BYTES:
        return Verdict.LENGTH
    head = bytes(slot[:HEADER_BYTES])  # a copy: the checks and the values are of the same bytes
    (magic, version, count, key_len, codec_len, layout_len, payload, raw, block, tag, key, codec,
     layout) = _FIXED.unpack_from(head)  # fmt: skip
    if magic != _MAGIC:
        return Verdict.MAGIC
    if version != FORMAT_VERSION:
        return Verdict.FORMAT
    if _SUM.unpack_from(head, _SUM_AT)[0] != xxhash.xxh3_64_intdigest(head[:_SUM_AT]):
        return Verdict.HEADER_CHECKSUM
    # Below here only a writer with another idea of the format can be wrong.
    if not 1 <= key_len <= MAX_KEY_BYTES or codec_len > MAX_CODEC_BYTES:
        return Verdict.FORMAT
    if layout_len > MAX_LAYOUT_BYTES or payload < 1 or block != block_bytes_of(payload):
        return Verdict.FORMAT
    if count != -(-payload // block) or count > MAX_BLOCKS or not codec[:codec_len].isascii():
        return Verdict.FORMAT
    return Header(
        key=key[:key_len],
        namespace=tag,
        payload_bytes=payload,
        raw_bytes=raw,
        codec=codec[:codec_len].decode("ascii"),
        layout=layout[:layout_len],
        block_bytes=block,
        sums=struct.unpack_from(f"<{count}Q", head, _FIXED.size),
    )


def verify(
    slot: memoryview,
    *,
    key: bytes,
    layout: bytes,
    stored_bytes: int | None = None,
    codec: str = "",
) -> Verdict:
    """Whether ``slot`` holds the whole, undamaged chunk of ``key`` in ``layout``.

    Args:
        slot: may be longer than the chunk.
        key: the stored key that was asked for.
        layout: the fingerprint that the reader needs.
        stored_bytes: how many bytes the store gave; the whole slot when None.
        codec: the one that the reader decodes, "" for none.

    Returns:
        OK, or the first thing found wrong.  Never raises on bad bytes.
    """
    have = slot.nbytes if stored_bytes is None else min(stored_bytes, slot.nbytes)
    if have < HEADER_BYTES:
        return Verdict.LENGTH
    header = read_header(slot)
    if isinstance(header, Verdict):
        return header
    if header.key != key:
        return Verdict.KEY
    if header.layout != layout:
        return Verdict.LAYOUT
    if header.codec != codec:
        return Verdict.CODEC
    if have < HEADER_BYTES + header.payload_bytes:
        return Verdict.LENGTH
    if _sums(slot, header.payload_bytes) != header.sums:
        return Verdict.PAYLOAD_CHECKSUM
    return Verdict.OK


def _sums(slot: memoryview, payload_bytes: int) -> tuple[int, ...]:
    block = block_bytes_of(payload_bytes)
    end = HEADER_BYTES + payload_bytes
    return tuple(
        xxhash.xxh3_64_intdigest(slot[start : min(start + block, end)])
        for start in range(HEADER_BYTES, end, block)
    )
