"""Identity of chunks: namespace, prefix digest, stored key.  By content, never by name.

What can't be encoded exactly raises ConfigError, so it is not cached.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lmcache_core.content import FileDigestCache, content_digest
from lmcache_core.sdk import ConfigError

__all__ = [
    "ChunkHasher",
    "FileDigestCache",
    "KeyParts",
    "Namespace",
    "STORED_KEY_BYTES",
    "canonical",
    "content_digest",
    "key_suffix",
    "split_key",
    "stored_key",
]

STORED_KEY_BYTES = 46
_TAG_BYTES, _DIGEST_BYTES, _TOKEN_BYTES = 8, 32, 4
_SUFFIX = struct.Struct("<IH")
_ROOT = b"lmcache/root/1\0"
_PLAIN = b"lmc/chunk/1\0"
_EXTRA = b"lmc/extra/1\0"


def canonical(value: object) -> bytes:
    """An injective encoding of None, bool, int, float, str, bytes, lists and str-keyed dicts.

    Raises:
        ConfigError: any other type.
    """
    if value is None:
        return b"n"
    if isinstance(value, bool):
        return b"t" if value else b"f"
    if isinstance(value, int):
        return _framed(b"i", str(value).encode())
    if isinstance(value, float):
        return b"d" + struct.pack("<d", value)
    if isinstance(value, str):
        return _framed(b"s", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return _framed(b"b", value)
    if isinstance(value, (list, tuple)):
        return _framed(b"l", b"".join(_framed(b"e", canonical(item)) for item in value))
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        items = sorted((canonical(key), canonical(item)) for key, item in value.items())
        return _framed(b"m", b"".join(_framed(b"k", k) + _framed(b"v", v) for k, v in items))
    raise ConfigError(
        f"a {type(value).__name__} can't be part of an identity", hint="use plain values"
    )


def _framed(tag: bytes, body: bytes) -> bytes:
    return tag + struct.pack("<Q", len(body)) + body


@dataclass(frozen=True, slots=True)
class Namespace:
    """What chunks belong to: one model, weights, layout, engine, tenant.

    Attributes:
        fields: the identifying facts, as they were given.
        encoded: their canonical encoding.
        tag: 8 bytes that stand for it in front of every stored key.
    """

    fields: Mapping[str, Any]
    encoded: bytes
    tag: bytes

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Namespace:
        """The namespace of ``fields``; see `canonical` for what they may hold."""
        encoded = canonical(dict(fields))
        return cls(dict(fields), encoded, hashlib.sha256(encoded).digest()[:_TAG_BYTES])

    def derive(self, **extra: Any) -> Namespace:
        """This namespace and further facts, such as a tenant's salt.

        Raises:
            ConfigError: a fact is already there.
        """
        if taken := self.fields.keys() & extra.keys():
            raise ConfigError(f"the namespace already has {sorted(taken)}")
        return Namespace.of({**self.fields, **extra})


class ChunkHasher:
    """Digests of the whole chunks of a prompt, each covering everything before it.

    Thread-safe.  Token ids are Python ints, or a buffer of 4- or 8-byte integers (numpy,
    array, memoryview); both give the same digests.

    Args:
        namespace: mixed into the root, with chunk size and algorithm.
        chunk_size: tokens in a chunk.
        algorithm: ``sha256``, or ``blake3`` when that package is installed.
    """

    def __init__(
        self, namespace: Namespace, *, chunk_size: int = 256, algorithm: str = "sha256"
    ) -> None:
        self.namespace = namespace
        self.chunk_size = chunk_size
        self._hash = _algorithm(algorithm)
        strategy = ["fixed", chunk_size, algorithm]
        self._root: bytes = self._hash(_ROOT + canonical([namespace.encoded, strategy])).digest()

    def digests(
        self, tokens: Sequence[int], extras: Mapping[int, bytes] | None = None
    ) -> list[bytes]:
        """One 32-byte digest for each whole chunk of ``tokens``."""
        return self.extend([], tokens, extras)

    def extend(
        self,
        digests: list[bytes],
        tokens: Sequence[int],
        extras: Mapping[int, bytes] | None = None,
    ) -> list[bytes]:
        """``digests`` (of the first chunks of ``tokens``) and those of the other whole ones.

        Args:
            extras: chunk index -> what else identifies that chunk, such as the hash and the
                position of an image.

        Raises:
            ConfigError: a token id is not in 0 .. 2**32 - 1.
        """
        step = self.chunk_size * _TOKEN_BYTES
        first = len(digests)
        data = _as_bytes(tokens, first * self.chunk_size)
        digest = digests[-1] if digests else self._root
        hashed, out = self._hash, list(digests)
        if not extras:
            for at in range(0, len(data) - step + 1, step):
                digest = hashed(_PLAIN + digest + data[at : at + step]).digest()
                out.append(digest)
            return out
        for index, at in enumerate(range(0, len(data) - step + 1, step), first):
            part = data[at : at + step]
            if (extra := extras.get(index)) is None:
                message = _PLAIN + digest + part
            else:
                message = _EXTRA + digest + bytes(part) + hashed(extra).digest()
            digest = hashed(message).digest()
            out.append(digest)
        return out


class KeyParts(NamedTuple):
    """A stored key, taken apart."""

    tag: bytes
    digest: bytes
    shard: int
    group: int


def key_suffix(shard: int, group: int) -> bytes:
    """Last 6 bytes of a stored key: TP/PP shard (u32) and KV cache group (u16)."""
    return _SUFFIX.pack(shard, group)


def stored_key(tag: bytes, digest: bytes, *, shard: int = 0, group: int = 0) -> bytes:
    """46 bytes: namespace tag, digest, shard, group."""
    return tag + digest + key_suffix(shard, group)


def split_key(key: bytes) -> KeyParts:
    """The parts of a stored key.

    Raises:
        ConfigError: not 46 bytes.
    """
    if len(key) != STORED_KEY_BYTES:
        raise ConfigError(f"a stored key has {STORED_KEY_BYTES} bytes, not {len(key)}")
    end = _TAG_BYTES + _DIGEST_BYTES
    shard, group = _SUFFIX.unpack(key[end:])
    return KeyParts(key[:_TAG_BYTES], key[_TAG_BYTES:end], shard, group)


def _as_bytes(tokens: Sequence[int], start: int) -> memoryview:
    """Token ids from ``start`` on as little-endian u32."""
    try:
        view = memoryview(tokens)  # type: ignore[arg-type]
    except TypeError:
        view = None
    source: Sequence[int] = tokens
    if view is not None:
        if view.itemsize == 1:
            raise _bad_token()
        fast = view.itemsize == _TOKEN_BYTES and view.format in ("I", "L", "i", "l")
        if fast and view.c_contiguous and sys.byteorder == "little":
            data = view.cast("B")[start * _TOKEN_BYTES :]
            # A negative id has the top bit of its last byte set.
            if view.format in ("i", "l") and max(data[3::4].tobytes(), default=0) > 127:
                raise _bad_token()
            return data
        source = view.tolist()
    try:
        ids = array("I", source[start:])
    except (OverflowError, TypeError, ValueError) as error:
        raise _bad_token() from error
    if sys.byteorder != "little":
        ids.byteswap()
    return memoryview(ids).cast("B")


def _bad_token() -> ConfigError:
    return ConfigError("a token id is not an integer in 0 .. 2**32 - 1")


def _algorithm(name: str) -> Callable[..., Any]:
    if name == "sha256":
        return hashlib.sha256
    if name == "blake3":
        try:
            from blake3 import blake3
        except ImportError as error:
            raise ConfigError(
                "hash_algorithm blake3 is not installed", hint='pip install "lmcache-core[blake3]"'
            ) from error
        return blake3  # type: ignore[no-any-return]
    raise ConfigError(f"unknown hash_algorithm {name!r}", hint="sha256 or blake3")
