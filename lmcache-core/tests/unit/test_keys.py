"""Identity: by content, injective, and failing closed."""

from __future__ import annotations

import enum
import importlib.util
import json
import os
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.content import FileDigestCache, content_digest
from lmcache_core.keys import (
    ChunkHasher,
    Namespace,
    canonical,
    key_suffix,
    split_key,
    stored_key,
)
from lmcache_core.sdk.errors import ConfigError, ContractViolation

FIELDS: dict[str, object] = {
    "weights": "ab" * 32,
    "dtype": "bfloat16",
    "chunk_size": 256,
    "scale": 1.0,
    "quantised": False,
    "layers": ["a", "b"],
    "rope": {"base": 10000, "factor": None},
    "salt": b"",
}
TOKENS = list(range(1000, 1040))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
VALUES = st.recursive(
    SCALARS | st.text(st.characters(exclude_categories=["Cs"])) | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=6,
)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def hasher(fields: dict[str, object] | None = None, **options: Any) -> ChunkHasher:
    return ChunkHasher(Namespace.of(FIELDS if fields is None else fields), chunk_size=4, **options)


def shape(value: object) -> object:
    """``value`` with its types, so that 1, 1.0, True and 0.0, -0.0 differ."""
    if isinstance(value, (list, tuple)):
        return (type(value), [shape(item) for item in value])
    if isinstance(value, dict):
        return (dict, sorted((k, repr(shape(v))) for k, v in value.items()))
    return (type(value), repr(value))


@given(VALUES, VALUES)
@settings(max_examples=200, deadline=None)
def test_canonical_is_injective(one: object, other: object) -> None:
    assert (canonical(one) == canonical(other)) == (shape(one) == shape(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, True), (1, 1.0), (0.0, -0.0), ("a", b"a"), ([1], (1,)), (["ab"], ["a", "b"]), ("", None),
     ({"a": [1, 2]}, {"a": [1], "b": 2}), (127, -129), (255, -1)],
)  # fmt: skip
def test_values_that_look_alike_differ(one: object, other: object) -> None:
    assert canonical(one) != canonical(other)


class Colour(str, enum.Enum):
    RED = "red"


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, Colour.RED, np.float64(1), bytearray(b"x"), float("nan"), "\ud800"]
)
def test_other_values_have_no_identity(value: object) -> None:
    with pytest.raises(ConfigError):
        canonical({"nested": [value]})


def test_a_value_inside_itself_has_no_identity() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ConfigError):
        canonical(loop)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_each_field_changes_tag_and_digests(name: str) -> None:
    for value in ("changed", 7, None if FIELDS[name] is not None else 0):
        changed = {**FIELDS, name: value}
        assert Namespace.of(changed).tag != Namespace.of(FIELDS).tag
        assert not set(hasher(changed).digests(TOKENS)) & set(hasher().digests(TOKENS))


def test_order_of_fields_does_not_matter() -> None:
    assert Namespace.of(dict(reversed(FIELDS.items()))) == Namespace.of(FIELDS)


def test_derive_adds_and_refuses_to_overwrite() -> None:
    base = Namespace.of(FIELDS)
    assert base.derive(lora="x") == Namespace.of({**FIELDS, "lora": "x"})
    assert base.derive(lora="x").tag != base.tag
    with pytest.raises(ConfigError):
        base.derive(salt=b"other")


def test_a_namespace_does_not_follow_its_fields() -> None:
    layers = ["a"]
    namespace = Namespace.of({"layers": layers})
    layers.append("b")
    assert namespace.derive(x=1) == Namespace.of({"layers": ["a"], "x": 1})


def test_chunk_size_and_algorithm_are_part_of_the_root() -> None:
    namespace = Namespace.of(FIELDS)
    assert ChunkHasher(namespace, chunk_size=4).root != ChunkHasher(namespace, chunk_size=8).root
    with pytest.raises(ConfigError):
        ChunkHasher(namespace, algorithm="md5")
    with pytest.raises(ConfigError):
        ChunkHasher(namespace, chunk_size=0)


def test_blake3_is_another_root_or_a_clear_refusal() -> None:
    if importlib.util.find_spec("blake3") is None:
        with pytest.raises(ConfigError, match="blake3"):
            hasher(algorithm="blake3")
    else:
        assert hasher(algorithm="blake3").digests(TOKENS)[0] != hasher().digests(TOKENS)[0]


@given(IDS, st.data())
@settings(max_examples=100, deadline=None)
def test_a_shared_prefix_and_nothing_else_is_shared(tokens: list[int], data: st.DataObject) -> None:
    first = hasher().digests(tokens)
    assert len(first) == len(tokens) // 4 and all(len(digest) == 32 for digest in first)
    if not tokens:
        return
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]]
    second = hasher().digests(other)
    assert first[: at // 4] == second[: at // 4]
    assert not set(first[at // 4 :]) & set(second[at // 4 :])


@given(
    IDS, st.lists(st.integers(0, 40), max_size=4), st.dictionaries(st.integers(0, 9), st.binary())
)
@settings(max_examples=100, deadline=None)
def test_in_steps_is_as_at_once(
    tokens: list[int], cuts: list[int], extras: dict[int, bytes]
) -> None:
    digests: list[bytes] = []
    for cut in [*sorted(cuts), len(tokens)]:
        if cut <= len(tokens):
            assert hasher().extend(digests, tokens[:cut], extras) is digests
    assert digests == hasher().digests(tokens, extras)


@given(IDS, st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_every_kind_of_tokens_gives_the_same_digests(tokens: list[int], known: int) -> None:
    expected = hasher().digests(tokens)
    strided = np.repeat(np.array(tokens, dtype=np.int32), 2)[::2]
    kinds: list[Any] = [tuple(tokens), array("i", tokens), array("I", tokens), array("q", tokens)]
    kinds += [np.array(tokens, dtype=kind) for kind in (np.int32, np.uint32, np.int64, np.uint64)]
    kinds += [strided, memoryview(array("i", tokens)), memoryview(array("q", tokens))]
    for kind in kinds:
        assert hasher().digests(kind) == expected
        assert hasher().extend(expected[:known], kind) == expected


@pytest.mark.parametrize("bad", [-1, 2**32, 2**40, 1.5, "7", None])
@pytest.mark.parametrize("at", [0, 5])
def test_ids_that_are_no_u32_are_refused(bad: Any, at: int) -> None:
    tokens = [1] * 8
    tokens[at] = bad
    with pytest.raises(ConfigError):
        hasher().digests(tokens)


@pytest.mark.parametrize(
    "tokens",
    [array("i", [1, 2, 3, -1]), np.array([1, 2, 3, -1], dtype=np.int32), np.array([0, 0, 0, -1]),
     memoryview(array("i", [1, 2, 3, -1])), array("q", [0, 0, 0, 2**32]), np.array([2**32] * 4),
     b"abcd", "abcd", np.ones(4), np.ones((4, 4), dtype=np.int32), array("h", [1] * 4)],
)  # fmt: skip
def test_buffers_that_are_no_u32_are_refused(tokens: Any) -> None:
    with pytest.raises(ConfigError):
        hasher().digests(tokens)


def test_the_largest_id_is_fine() -> None:
    tokens = [2**32 - 1] * 4
    assert hasher().digests(tokens) == hasher().digests(np.array(tokens, dtype=np.uint32))


def test_an_extra_identity_changes_its_chunk_and_all_after() -> None:
    plain, extra = hasher().digests(TOKENS), hasher().digests(TOKENS, {2: b"image"})
    assert plain[:2] == extra[:2]
    assert not set(plain[2:]) & set(extra[2:])
    assert extra[2] != hasher().digests(TOKENS, {2: b"other"})[2]
    assert plain[2] != hasher().digests(TOKENS, {2: b""})[2]


def test_more_digests_than_chunks_is_a_violation() -> None:
    with pytest.raises(ContractViolation):
        hasher().extend([bytes(32)], [1, 2, 3])


@given(st.binary(min_size=8, max_size=8), st.binary(min_size=32, max_size=32),
       st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1))  # fmt: skip
def test_stored_keys_come_apart_again(tag: bytes, digest: bytes, shard: int, group: int) -> None:
    key = stored_key(tag, digest, shard=shard, group=group)
    assert len(key) == 46 and key.endswith(key_suffix(shard, group))
    assert split_key(key) == (tag, digest, shard, group)


def test_keys_of_a_wrong_size_are_violations() -> None:
    for call in (
        lambda: stored_key(bytes(7), bytes(32)),
        lambda: stored_key(bytes(8), bytes(31)),
        lambda: split_key(bytes(45)),
        lambda: key_suffix(2**32, 0),
        lambda: key_suffix(0, -1),
    ):
        with pytest.raises(ContractViolation):
            call()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(1000))
    return directory


def later() -> int:
    """A clock by which every file settled long ago."""
    return time.time_ns() + 10**12


def test_one_weight_byte_changes_the_digest(weights: Path, tmp_path: Path) -> None:
    cache = FileDigestCache(tmp_path / "cache.json")
    before = content_digest(weights, cache=cache)
    assert content_digest(weights, cache=cache) == content_digest(weights, cache=None) == before
    file = weights / "model.safetensors"
    found = file.stat()
    file.write_bytes(bytes(999) + b"\1")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert content_digest(weights, cache=cache) != before


def test_a_change_with_the_old_mtime_is_seen_by_a_settled_cache(weights: Path) -> None:
    cache = FileDigestCache(now_ns=later)
    before = content_digest(weights, cache=cache)
    file = weights / "model.safetensors"
    found = file.stat()
    time.sleep(0.05)  # the clock of ctime ticks
    file.write_bytes(bytes(999) + b"\1")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert content_digest(weights, cache=cache) != before


def test_an_unchanged_file_is_not_read_again(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "sub" / "cache.json"
    before = content_digest(weights, cache=FileDigestCache(path, now_ns=later))
    assert path.stat().st_mode & 0o777 == 0o600
    stored = json.loads(path.read_text())
    for entry in stored["entries"].values():
        entry[4] = "remembered"
    path.write_text(json.dumps(stored))
    assert content_digest(weights, cache=FileDigestCache(path, now_ns=later)) != before


def test_a_file_changed_just_now_is_not_remembered(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    content_digest(weights, cache=FileDigestCache(path))
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"entries": 3}', '{"entries": {"a": 1}}'])
def test_a_broken_cache_is_ignored_and_rewritten(weights: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "cache.json"
    path.write_text(text)
    cache = FileDigestCache(path, now_ns=later)
    assert content_digest(weights, cache=cache) == content_digest(weights, cache=None)
    assert len(json.loads(path.read_text())["entries"]) >= 2


def test_a_cache_that_others_may_write_is_ignored(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    before = content_digest(weights, cache=FileDigestCache(path, now_ns=later))
    path.write_text(path.read_text().replace('", ', '"').replace("0", "1"))
    path.chmod(0o666)
    assert content_digest(weights, cache=FileDigestCache(path, now_ns=later)) == before


def test_a_cache_that_can_not_be_written_is_no_error(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = FileDigestCache(tmp_path / "file" / "cache.json", now_ns=later)
    assert content_digest(weights, cache=cache) == content_digest(weights, cache=None)


@pytest.mark.parametrize(
    "name",
    ["README", "README.txt", "LICENSE", "notes.md", "tokenizer.json", "tokenizer_config.json",
     "special_tokens_map.json", "vocab.json", "merges.txt", "generation_config.json",
     "chat_template.jinja", ".gitattributes"],
)  # fmt: skip
def test_files_that_change_no_page_are_left_out(weights: Path, name: str) -> None:
    before = content_digest(weights, cache=None)
    (weights / name).write_text("x")
    assert content_digest(weights, cache=None) == before


def test_names_count_relative_to_the_directory(weights: Path, tmp_path: Path) -> None:
    before = content_digest(weights, cache=None)
    moved = weights.rename(tmp_path / "moved")
    assert content_digest(moved, cache=None) == before
    (moved / "config.json").rename(moved / "config2.json")
    assert content_digest(moved, cache=None) != before


def test_links_are_followed(weights: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in weights.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert content_digest(snapshot, cache=None) == content_digest(weights, cache=None)
    (snapshot / "loop").symlink_to(snapshot)
    assert content_digest(snapshot, cache=None) == content_digest(weights, cache=None)


def test_a_single_file_has_an_identity(weights: Path) -> None:
    file = weights / "model.safetensors"
    assert content_digest(file, cache=None) != content_digest(weights, cache=None)


def test_what_can_not_be_read_has_no_identity(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (weights / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "missing", tmp_path / "empty", weights):
        with pytest.raises(ConfigError):
            content_digest(path, cache=None)
    (weights / "gone.safetensors").unlink()
    os.mkfifo(weights / "pipe")
    with pytest.raises(ConfigError):
        content_digest(weights, cache=None)


def test_a_partial_chunk_is_told_from_every_other_length_and_prefix() -> None:
    hasher = ChunkHasher(Namespace.of({"model": "m"}), chunk_size=4)
    whole = hasher.digests([1, 2, 3, 4])
    found = [hasher.partial(None, [1, 2, 3][:n]) for n in (1, 2, 3)]
    found += [hasher.partial(whole[0], [1, 2, 3][:n]) for n in (1, 2, 3)]
    assert len({*found, *whole}) == 7
    for tokens in ([], [1, 2, 3, 4]):
        with pytest.raises(ContractViolation):
            hasher.partial(None, tokens)
