"""Identity of chunks: namespace, prefix digest, stored key.

What can't be identified raises ConfigError and is not cached.
"""

from __future__ import annotations

import hashlib
import math
import struct
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lmcache_core.sdk.errors import ConfigError, ContractViolation

TAG_BYTES = 8
DIGEST_BYTES = 32
STORED_KEY_BYTES = 46

_MAX_DEPTH = 64
_LEN = struct.Struct("<Q")
_ROOT_DOMAIN = b"lmc:root"
_CHUNK_DOMAIN = b"lmc:chnk"
_EXTRA_DOMAIN = b"lmc:chnx"
_SUFFIX = struct.Struct("<IH")


def canonical(value: object) -> bytes:
    """Injective encoding: two values have one encoding only if they are equal and of one type.

    None, bool, int, float (not NaN), str, bytes, list, tuple and dict (in any order), nested
    up to 64 deep; exact types, no subclasses.

    Raises:
        ConfigError: any other value.
    """
    return _encode(value, 0)


def _encode(value: object, depth: int) -> bytes:
    if depth > _MAX_DEPTH:
        raise ConfigError(f"an identity nested over {_MAX_DEPTH} deep", op="identity")
    kind = type(value)
    if value is None:
        return b"n"
    if kind is bool:
        return b"t" if value else b"f"
    if isinstance(value, int) and kind is int:
        body = value.to_bytes((value.bit_length() + 8) // 8, "big", signed=True)
        return b"i" + _LEN.pack(len(body)) + body
    if isinstance(value, float) and kind is float and not math.isnan(value):
        return b"d" + struct.pack(">d", value)
    if isinstance(value, str) and kind is str:
        try:
            body = value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"an identity with a broken string: {error}", op="identity") from None
        return b"s" + _LEN.pack(len(body)) + body
    if isinstance(value, bytes) and kind is bytes:
        return b"b" + _LEN.pack(len(value)) + value
    if isinstance(value, (list, tuple)) and kind in (list, tuple):
        tag = b"l" if kind is list else b"u"
        items = [_encode(item, depth + 1) for item in value]
        return tag + _LEN.pack(len(items)) + b"".join(items)
    if isinstance(value, dict) and kind is dict:
        return _encode_pairs(
            [(_encode(k, depth + 1), _encode(v, depth + 1)) for k, v in value.items()]
        )
    raise ConfigError(
        f"a value of type {kind.__name__} has no identity",
        op="identity",
        hint="give plain None, bool, int, float, str, bytes, list, tuple or dict",
    )


def _encode_pairs(pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
    return b"m" + _LEN.pack(len(pairs)) + b"".join(k + v for k, v in sorted(pairs))


@dataclass(frozen=True, slots=True)
class Namespace:
    """Everything that chunks must have in common to be interchangeable, but the tokens.

    Attributes:
        tag: first 8 bytes of the SHA-256 of ``encoded``.
        encoded: canonical encoding of the fields.
        pairs: the encoded fields, for `derive`.
    """

    tag: bytes
    encoded: bytes
    pairs: tuple[tuple[bytes, bytes], ...]

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> Namespace:
        """The namespace of named fields; their order does not matter.

        Raises:
            ConfigError: a name is not a str, or a value has no identity.
        """
        for name in fields:
            if type(name) is not str:
                raise ConfigError(f"a namespace field named {name!r}", op="identity")
        return cls._of(tuple((canonical(k), canonical(v)) for k, v in fields.items()))

    @classmethod
    def from_pairs(cls, pairs: Sequence[tuple[bytes, bytes]]) -> Namespace:
        """The namespace that has these `pairs`, in any order.

        Raises:
            ConfigError: a field is there twice.
        """
        if len({name for name, _ in pairs}) != len(pairs):
            raise ConfigError("a namespace with a field twice", op="identity")
        return cls._of(tuple(pairs))

    @classmethod
    def _of(cls, pairs: tuple[tuple[bytes, bytes], ...]) -> Namespace:
        encoded = _encode_pairs(pairs)
        return cls(hashlib.sha256(encoded).digest()[:TAG_BYTES], encoded, tuple(sorted(pairs)))

    def derive(self, **extra: object) -> Namespace:
        """This namespace with more fields, such as a tenant's salt or a LoRA's content.

        Raises:
            ConfigError: a field is there already, or has no identity.
        """
        present = {name for name, _ in self.pairs}
        for name in extra:
            if canonical(name) in present:
                raise ConfigError(f"the namespace has a field {name!r} already", op="identity")
        return self._of(self.pairs + Namespace.of(extra).pairs)

    def differing_fields(self, other: Namespace) -> list[str]:
        """Names of the fields in which the two differ, sorted."""
        return sorted({k[1 + _LEN.size :].decode() for k, _ in set(self.pairs) ^ set(other.pairs)})


class ChunkHasher:
    """Chains the digests of a prefix's chunks.  Immutable, so thread-safe.

    Args:
        namespace: what the chunks have in common.
        chunk_size: tokens in a chunk.
        algorithm: ``"sha256"`` or ``"blake3"`` (an extra of the package).

    Raises:
        ConfigError: an unknown or missing algorithm, or a chunk size below 1.

    Attributes:
        root: 32-byte digest that the first chunk is chained to.
    """

    __slots__ = ("_hash", "chunk_size", "namespace", "root")

    def __init__(
        self, namespace: Namespace, *, chunk_size: int = 256, algorithm: str = "sha256"
    ) -> None:
        if chunk_size < 1:
            raise ConfigError(f"chunk_size {chunk_size} is below 1", op="identity")
        self._hash: Callable[[bytes], Any] = _hash_of(algorithm)
        self.namespace = namespace
        self.chunk_size = chunk_size
        identity = canonical((namespace.encoded, chunk_size, algorithm, "fixed"))
        self.root: bytes = self._hash(_ROOT_DOMAIN + identity).digest()

    def digests(self, tokens: Any, extras: Mapping[int, bytes] | None = None) -> list[bytes]:
        """Digest of every whole chunk of ``tokens``; see `extend`."""
        return self.extend([], tokens, extras)

    def extend(
        self, digests: list[bytes], tokens: Any, extras: Mapping[int, bytes] | None = None
    ) -> list[bytes]:
        """Append the digests of all further whole chunks, in place.

        Args:
            digests: of the first ``len(digests)`` chunks of ``tokens``, from `extend` before.
            tokens: all token ids from the first on: a sequence of int, or a flat buffer
                (ndarray, array, memoryview) of 4 or 8-byte integers.
            extras: extra identity of a chunk by its index (multimodal hashes with positions).

        Returns:
            ``digests`` itself, one 32-byte digest a chunk.

        Raises:
            ConfigError: a token id outside of 0..2**32-1, or tokens of another type.
            ContractViolation: more digests than whole chunks.
        """
        size, done = self.chunk_size, len(digests)
        total = len(tokens) // size
        if done >= total:
            if done > total:
                raise ContractViolation(f"{done} digests for {total} chunks", op="identity")
            return digests
        # No slice of the whole: it would copy a list before the conversion copies it again.
        data = _u32_bytes(tokens[done * size :] if done else tokens)
        step = 4 * size
        if data.nbytes != 4 * (len(tokens) - done * size):
            raise ConfigError("token ids are not one flat sequence", op="identity")
        data = data[: (total - done) * step]
        h = self._hash
        digest = digests[-1] if digests else self.root
        append = digests.append
        if not extras:
            for start in range(0, data.nbytes, step):
                digest = h(_CHUNK_DOMAIN + digest + data[start : start + step]).digest()
                append(digest)
            return digests
        for index in range(done, total):
            start = (index - done) * step
            message = digest + data[start : start + step]
            extra = extras.get(index)
            if extra is None:
                digest = h(_CHUNK_DOMAIN + message).digest()
            else:
                extra_digest = hashlib.sha256(extra).digest()
                digest = h(_EXTRA_DOMAIN + message + extra_digest).digest()
            append(digest)
        return digests

    def partial(self, previous: bytes | None, tokens: Any) -> bytes:
        """Digest of a last chunk of fewer than ``chunk_size`` tokens.

        ``previous`` is the digest of the chunk before it, None for the first.  The length of
        the message tells it from every whole chunk.

        Raises:
            ConfigError: see `extend`.
            ContractViolation: no token, or a whole chunk of them.
        """
        if not 0 < len(tokens) < self.chunk_size:
            raise ContractViolation(f"a partial chunk of {len(tokens)} tokens", op="identity")
        digest = self.root if previous is None else previous
        hashed: bytes = self._hash(_CHUNK_DOMAIN + digest + _u32_bytes(tokens)).digest()
        return hashed


def _hash_of(algorithm: str) -> Callable[[bytes], Any]:
    if algorithm == "sha256":
        return hashlib.sha256
    if algorithm != "blake3":
        raise ConfigError(
            f"hash_algorithm {algorithm!r} is unknown", op="identity", hint="sha256 or blake3"
        )
    try:
        import blake3
    except ImportError:
        raise ConfigError(
            "hash_algorithm blake3 is not installed",
            op="identity",
            hint="pip install 'lmcache-core[blake3]', or use sha256",
        ) from None
    chosen: Callable[[bytes], Any] = blake3.blake3
    return chosen


def _u32_bytes(tokens: Any) -> memoryview:
    """Little-endian u32 of every token id, without a copy where the buffer has it already."""
    try:
        return _from_buffer(tokens) or _little(array("I", tokens))
    except (TypeError, ValueError, OverflowError, BufferError) as error:
        raise ConfigError(
            f"token ids must be integers from 0 to 2**32-1: {error}", op="identity"
        ) from None


def _from_buffer(tokens: Any) -> memoryview | None:
    if isinstance(tokens, (list, tuple)):
        return None
    try:
        view = memoryview(tokens)
    except TypeError:
        return None  # another sequence of int
    code = view.format.lstrip("@=<" if sys.byteorder == "little" else "@=")
    if view.ndim != 1 or code not in ("i", "I", "l", "L", "q", "Q"):
        raise ConfigError(f"token ids of {view.ndim} dimensions, format {view.format!r}")
    if view.itemsize != 4 or not view.c_contiguous or sys.byteorder != "little":
        # numpy converts far faster than an element at a time; it is not imported for it.
        if hasattr(tokens, "astype") and hasattr(tokens, "min"):
            if tokens.min() < 0 or tokens.max() >= 1 << 32:
                raise ConfigError("a token id is outside of 0 to 2**32-1", op="identity")
            return memoryview(tokens.astype("<u4", order="C")).cast("B")
        return _little(array("I", view.tolist()))
    data = view.cast("B")
    if code in ("i", "l") and not _all_positive(tokens, data):
        raise ConfigError("a token id is negative", op="identity")
    return data


def _all_positive(tokens: Any, data: memoryview) -> bool:
    if hasattr(tokens, "min"):
        return bool(tokens.min() >= 0)
    return bytes(data)[3::4].isascii()  # the sign bit of every id, at the speed of C


def _little(ids: array[int]) -> memoryview:
    if ids.itemsize != 4:
        raise ConfigError("this platform has no 4-byte unsigned int", op="identity")
    if sys.byteorder == "big":
        ids.byteswap()
    return memoryview(ids).cast("B")


class KeyParts(NamedTuple):
    """The parts of a stored key."""

    tag: bytes
    digest: bytes
    shard: int
    group: int


def key_suffix(shard: int, group: int) -> bytes:
    """Last 6 bytes of a stored key: u32 shard, u16 KV-cache group, little-endian.

    Raises:
        ContractViolation: a number does not fit.
    """
    try:
        return _SUFFIX.pack(shard, group)
    except struct.error as error:
        raise ContractViolation(f"shard {shard}, group {group}: {error}", op="key") from None


def stored_key(tag: bytes, digest: bytes, *, shard: int = 0, group: int = 0) -> bytes:
    """The 46 bytes under which a chunk is stored: tag, digest, shard, group.

    Raises:
        ContractViolation: a part has the wrong size.
    """
    if len(tag) != TAG_BYTES or len(digest) != DIGEST_BYTES:
        raise ContractViolation(f"tag of {len(tag)}, digest of {len(digest)} bytes", op="key")
    return tag + digest + key_suffix(shard, group)


def split_key(key: bytes) -> KeyParts:
    """The parts of ``key``; the inverse of `stored_key`.

    Raises:
        ContractViolation: it has not 46 bytes.
    """
    if len(key) != STORED_KEY_BYTES:
        raise ContractViolation(f"a stored key of {len(key)} bytes", op="key")
    shard, group = _SUFFIX.unpack(key[40:])
    return KeyParts(key[:8], key[8:40], shard, group)
