"""The format of stored keys, pinned: another value here orphans every chunk stored before."""

from __future__ import annotations

import pytest

from lmcache_core.keys import ChunkHasher, Namespace, canonical, stored_key

NAMESPACE = Namespace.of(
    {
        "model": "m",
        "dtype": "bf16",
        "layers": 2,
        "scale": 1.5,
        "tied": True,
        "lora": None,
        "shape": [2, 8, 128],
        "salt": b"\x00\xff",
    }
)
TAG = "44a9a02b1d11fe67"
FIRST = "8c6cfe0f153c190485658e89104c47ee0771421f8a46f42f3f9f6423bb3cfdeb"
SECOND = "d63cbfeb4af84666e68fe760436bc4da35191398ad02a36d3e478365c1e8d60a"


def test_the_tag_of_a_namespace_is_pinned() -> None:
    assert NAMESPACE.tag.hex() == TAG


def test_the_digests_of_a_prefix_are_pinned() -> None:
    tokens = [0, 1, 2, 3, 2**32 - 1, 5, 6, 7, 8]
    digests = ChunkHasher(NAMESPACE, chunk_size=4).digests(tokens, {1: b"image"})
    assert [digest.hex() for digest in digests] == [FIRST, SECOND]


def test_the_bytes_of_a_stored_key_are_pinned() -> None:
    key = stored_key(bytes.fromhex(TAG), bytes.fromhex(FIRST), shard=3, group=1)
    assert key.hex() == TAG + FIRST + "03000000" + "0100"


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (None, b"n"),
        (True, b"t"),
        (False, b"f"),
        (0, b"i\x01" + bytes(7) + b"\x00"),
        (-1, b"i\x01" + bytes(7) + b"\xff"),
        (128, b"i\x02" + bytes(7) + b"\x00\x80"),
        (1.0, b"d\x3f\xf0" + bytes(6)),
        ("a", b"s\x01" + bytes(7) + b"a"),
        (b"a", b"b\x01" + bytes(7) + b"a"),
        ([None], b"l\x01" + bytes(7) + b"n"),
        ((None,), b"u\x01" + bytes(7) + b"n"),
        ({None: True}, b"m\x01" + bytes(7) + b"nt"),
    ],
)
def test_the_encoding_of_each_type_is_pinned(value: object, encoded: bytes) -> None:
    assert canonical(value) == encoded
