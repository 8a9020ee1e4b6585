"""The envelope: OK means the exact bytes sealed under that exact identity."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core import envelope
from lmcache_core.envelope import HEADER_BYTES, Header, Verdict
from lmcache_core.sdk.errors import ContractViolation

KEY = bytes(range(46))
LAYOUT = b"L" * 16
MIB = 1 << 20


def sealed(payload: bytes = b"payload" * 99, *, codec: str = "", extra: int = 0) -> memoryview:
    size = envelope.stored_bytes(len(payload))
    slot = memoryview(bytearray(b"\xaa" * (size + extra)))
    slot[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
    envelope.seal(slot, key=KEY, layout=LAYOUT, payload_bytes=len(payload), codec=codec)
    return slot


def check(slot: memoryview, **changed: object) -> Verdict:
    return envelope.verify(slot, **{"key": KEY, "layout": LAYOUT, **changed})  # type: ignore[arg-type]


@given(payload=st.binary(min_size=1, max_size=9000), extra=st.integers(0, 5000))
@settings(max_examples=60, deadline=None)
def test_round_trip(payload: bytes, extra: int) -> None:
    slot = sealed(payload, extra=extra)
    assert check(slot) is Verdict.OK
    header = envelope.read_header(slot)
    assert isinstance(header, Header)
    assert (header.key, header.namespace, header.layout) == (KEY, KEY[:8], LAYOUT)
    assert header.payload_bytes == header.raw_bytes == len(payload)
    end = envelope.stored_bytes(len(payload))
    assert not any(slot[HEADER_BYTES + len(payload) : end]), "the padding is zero"
    assert all(byte == 0xAA for byte in slot[end:]), "bytes after the slot are left alone"


@pytest.mark.parametrize("nbytes", [MIB - 1, MIB, MIB + 1, 2 * MIB + 5])
def test_every_block_has_its_own_sum(nbytes: int) -> None:
    slot = sealed(os.urandom(nbytes))
    header = envelope.read_header(slot)
    assert isinstance(header, Header)
    assert header.block_bytes == MIB and len(header.sums) == -(-nbytes // MIB)
    for at in (0, nbytes - 1, nbytes // 2):
        slot[HEADER_BYTES + at] ^= 1
        assert check(slot) is Verdict.PAYLOAD_CHECKSUM
        slot[HEADER_BYTES + at] ^= 1
    assert check(slot) is Verdict.OK


@pytest.mark.parametrize(
    ("payload_bytes", "block"),
    [(1, MIB), (256 * MIB, MIB), (256 * MIB + 1, 2 * MIB), (1 << 40, 1 << 32)],
)
def test_blocks_grow_with_the_payload(payload_bytes: int, block: int) -> None:
    assert envelope.block_bytes_of(payload_bytes) == block


def test_every_bit_of_the_header_counts() -> None:
    slot = sealed()
    for bit in range(HEADER_BYTES * 8):
        slot[bit // 8] ^= 1 << bit % 8
        assert check(slot) is not Verdict.OK, bit
        slot[bit // 8] ^= 1 << bit % 8
    assert check(slot) is Verdict.OK


def test_every_bit_of_a_small_payload_counts() -> None:
    payload = os.urandom(200)
    slot = sealed(payload)
    for bit in range(len(payload) * 8):
        slot[HEADER_BYTES + bit // 8] ^= 1 << bit % 8
        assert check(slot) is Verdict.PAYLOAD_CHECKSUM
        slot[HEADER_BYTES + bit // 8] ^= 1 << bit % 8


def test_each_reason_has_its_name() -> None:
    slot = sealed()
    assert check(slot, key=KEY[:-1] + b"x") is Verdict.KEY
    assert check(slot, key=KEY[:-1]) is Verdict.KEY
    assert check(slot, layout=LAYOUT + b"\0") is Verdict.LAYOUT
    for at, verdict in ((0, Verdict.MAGIC), (8, Verdict.FORMAT), (4000, Verdict.HEADER_CHECKSUM)):
        broken = memoryview(bytearray(slot))
        broken[at] ^= 1
        assert check(broken) is verdict


def test_an_encoded_payload_is_not_served_as_raw() -> None:
    slot = sealed(codec="zstd")
    assert check(slot) is Verdict.CODEC
    assert check(slot, codec="zstd") is Verdict.OK
    assert check(sealed(), codec="zstd") is Verdict.CODEC


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 4000, 4095, 4096, 4097, 5000, 6095])
def test_a_truncated_value_is_a_length(cut: int) -> None:
    slot = sealed(bytes(2000))
    assert check(slot, stored_bytes=cut) is Verdict.LENGTH
    assert check(slot[:cut]) is Verdict.LENGTH
    assert check(slot, stored_bytes=6096) is Verdict.OK


def test_a_stored_size_beyond_the_slot_does_not_lengthen_it() -> None:
    slot = sealed(bytes(9000))
    assert check(slot[: HEADER_BYTES + 100], stored_bytes=1 << 40) is Verdict.LENGTH


def test_a_stale_value_of_another_key_is_refused() -> None:
    old, new = sealed(b"old" * 500), sealed(b"new" * 500)
    torn = memoryview(bytearray(new))
    torn[HEADER_BYTES:] = old[HEADER_BYTES:]
    assert check(torn) is Verdict.PAYLOAD_CHECKSUM


@given(noise=st.binary(max_size=9000), keep=st.integers(0, 120), size=st.integers(-1, 10_000))
@settings(max_examples=150, deadline=None)
def test_noise_is_never_ok_and_never_raises(noise: bytes, keep: int, size: int) -> None:
    data = bytearray(noise)
    data[:keep] = sealed()[: min(keep, len(data))]
    assert check(memoryview(data), stored_bytes=size) is not Verdict.OK


@pytest.mark.parametrize(
    "bad",
    [
        {"key": b""},
        {"key": bytes(65)},
        {"layout": bytes(33)},
        {"codec": "c" * 33},
        {"codec": "é"},
        {"payload_bytes": 0},
        {"payload_bytes": 5000},
    ],
)
def test_what_does_not_fit_is_refused_untouched(bad: dict[str, object]) -> None:
    data = bytearray(b"\xaa" * 8192)
    arguments = {"key": KEY, "layout": LAYOUT, "payload_bytes": 10, **bad}
    with pytest.raises(ContractViolation):
        envelope.seal(memoryview(data), **arguments)  # type: ignore[arg-type]
    assert data == b"\xaa" * 8192
