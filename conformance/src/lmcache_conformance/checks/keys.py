"""E: keys are opaque bytes."""

from __future__ import annotations

from lmcache_conformance.frame import check
from lmcache_conformance.memory import value
from lmcache_conformance.rig import Rig, within
from lmcache_core.sdk import Status, SupportsScan

AWKWARD = [
    b"\0", b"/", b"..", b".", b"a", b"A", b"~", b"*", b"?", b"[a]", b"{a}", b"%2e", b"-rf", b"\n",
    b"a/b", b"a\\b", b"../../etc/passwd", b"\n\r\0 ", b" a", b"a ", b"a\0", b"a\0b", b"\xe9",
    b"\xc3\xa9", b"e\xcc\x81", b"61", b"\xff" * 64, b"\0" * 64, b"x" * 64, b"x" * 63,
    bytes(range(64)),
    b"p" * 16 + b"1", b"p" * 16 + b"2", b"p" * 32 + b"1", b"p" * 32 + b"2", b"P" * 32 + b"1",
    b"CON", b"con", b"lost+found", b"tmp", b"v1",
]  # fmt: skip


def _all_there(rig: Rig, contents: dict[bytes, bytes]) -> None:
    batch = min(rig.claims.max_batch, 64)
    keys = list(contents)
    for start in range(0, len(keys), batch):
        rig.must_put({key: contents[key] for key in keys[start : start + batch]})
    for key, content in contents.items():
        rig.expect_value(key, content, f"key {key!r}")
    first = keys[0]
    rig.expect(rig.store.delete([first], within(5)) == [Status.OK], f"delete of {first!r}")
    rig.expect_absent(first, f"key {first!r} after its delete")
    for key in keys[1:]:
        rig.expect_value(key, contents[key], f"key {key!r} after the delete of {first!r}")


def _clean(rig: Rig, keys: list[bytes]) -> None:
    batch = rig.claims.max_batch
    for start in range(0, len(keys), batch):
        rig.store.delete(keys[start : start + batch], within(10))


@check(
    "E1", fix="encode keys (hex) where the store gives bytes a meaning; never decode them as text"
)
def awkward_keys(rig: Rig) -> None:
    """NUL, '/', '..', case twins, spaces, wildcards, text that is not UTF-8, and lengths 1 and 64
    are all different keys."""
    _clean(rig, AWKWARD)
    try:
        _all_there(rig, {key: value(i, rig.size(64)) for i, key in enumerate(AWKWARD)})
    finally:
        _clean(rig, AWKWARD)


@check("E2", fix="encode keys (hex) where the store gives bytes a meaning")
def every_byte_value(rig: Rig) -> None:
    """Each of the 256 byte values is a key of its own, alone and inside a longer key."""
    alone = [bytes([n]) for n in range(256)]
    inside = [rig.key("b") + bytes([n]) + b"z" for n in range(256)]
    for keys in (alone, inside):
        _clean(rig, keys)
        try:
            _all_there(rig, {key: value(i, rig.size(64)) for i, key in enumerate(keys)})
        finally:
            _clean(rig, keys)


@check("E3", fix="use the whole key; a hash or a prefix of it makes twins")
def shared_prefixes(rig: Rig) -> None:
    """Keys that share 16, 32, 45 or 63 bytes, or are a prefix of each other, stay apart."""
    base = (rig.key("prefix") * 8)[:63]
    keys = [base[:n] + end for n in (16, 32, 45, 63) for end in (b"1", b"2")]
    keys += [base[:n] for n in (9, 17, 33, 46)]
    _all_there(rig, {key: value(i, rig.size(64)) for i, key in enumerate(dict.fromkeys(keys))})


@check(
    "E4",
    fix="spread keys over directories or slots; nothing may be linear in their number",
    limit_s=600,
)
def many_keys(rig: Rig) -> None:
    """With many keys in the store (2,000, or 100,000 in the full plan) every one is found, and by
    a scan once."""
    count = 100_000 if rig.full else 2_000
    size = rig.claims.alignment if rig.claims.alignment > 1 else 16
    batch = rig.claims.max_batch
    keys = rig.keys(count)
    for start in range(0, count, batch):
        part = keys[start : start + batch]
        contents = {key: value(start + i, size) for i, key in enumerate(part)}
        rig.must_put(contents)
    for start in range(0, count, batch):
        part = keys[start : start + batch]
        answers = rig.store.exists(part, within(30))
        rig.expect(answers == [Status.OK] * len(part), f"a key of {count} is absent")
    for number in range(0, count, max(1, count // 500)):
        rig.expect_value(keys[number], value(number, size), f"key {number} of {count}")
    if rig.claims.scan:
        assert isinstance(rig.store, SupportsScan)
        listed = [entry.key for entry in rig.store.scan(rig.key("k"), within(60))]
        rig.expect(len(set(listed)) == len(listed), "a scan gives a key twice")
        rig.expect(set(listed) == set(keys), f"a scan gives {len(listed)} of {count} keys")
    _clean(rig, keys)
