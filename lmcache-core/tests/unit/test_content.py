"""Content digests: the same weights have one digest, other weights have another."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest

from lmcache_core.content import FileDigestCache, content_digest
from lmcache_core.sdk import ConfigError

_TICK_S = 0.05
"""Longer than the granularity of a file's times."""


class Cache(FileDigestCache):
    """A cache for which every file has settled; notes the names of the files that were read."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(path, now_ns=lambda: time.time_ns() + 10_000_000_000)
        self.read: list[str] = []

    def put(self, path: str, found: os.stat_result, digest: str) -> None:
        self.read.append(os.path.basename(path))
        super().put(path, found, digest)


def digest_of(path: Path) -> str:
    return content_digest(path, cache=None)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    top = tmp_path / "model"
    (top / "sub").mkdir(parents=True)
    (top / "config.json").write_text('{"layers": 2}')
    (top / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    (top / "sub" / "adapter.bin").write_bytes(b"adapter")
    return top


def flip(path: Path, at: int) -> None:
    """Change one byte in place: same inode, same size."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("at", [0, 8191, 16383])
@pytest.mark.parametrize("put_mtime_back", [False, True])
def test_one_changed_byte_is_another_digest_even_with_the_old_mtime(
    weights: Path, tmp_path: Path, at: int, put_mtime_back: bool
) -> None:
    path = tmp_path / "cache.json"
    cache = Cache(path)
    before = content_digest(weights, cache=cache)
    time.sleep(_TICK_S)
    file = weights / "model.safetensors"
    found = file.stat()
    flip(file, at)
    if put_mtime_back:
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
        assert file.stat().st_mtime_ns == found.st_mtime_ns
    after = digest_of(weights)
    assert after != before
    assert content_digest(weights, cache=Cache(path)) == after
    assert content_digest(weights, cache=cache) == after


def test_a_byte_put_back_is_the_old_digest_again(weights: Path) -> None:
    before = digest_of(weights)
    flip(weights / "model.safetensors", 7)
    assert digest_of(weights) != before
    flip(weights / "model.safetensors", 7)
    assert digest_of(weights) == before


@pytest.mark.parametrize(
    "change",
    ["renamed", "added", "removed", "moved", "swapped"],
)
def test_names_and_the_set_of_files_are_part_of_the_digest(weights: Path, change: str) -> None:
    before = digest_of(weights)
    config, adapter = weights / "config.json", weights / "sub" / "adapter.bin"
    if change == "renamed":
        config.rename(weights / "config2.json")
    elif change == "added":
        (weights / "empty.bin").write_bytes(b"")
    elif change == "removed":
        adapter.unlink()
    elif change == "moved":
        adapter.rename(weights / "adapter.bin")
    else:
        one, other = config.read_bytes(), adapter.read_bytes()
        config.write_bytes(other)
        adapter.write_bytes(one)
    assert digest_of(weights) != before


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
        "vocab.txt", "merges.txt", "README.md", "README", "LICENSE", "LICENSE.txt", "NOTES.md",
        "generation_config.json", "chat_template.jinja", ".gitattributes", ".cache/state.json",
        "sub/tokenizer.model", "sub/.hidden",
    ],
)  # fmt: skip
def test_files_that_change_no_kv_page_do_not_count(weights: Path, name: str) -> None:
    before = digest_of(weights)
    file = weights / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("one")
    assert digest_of(weights) == before
    file.write_text("another")
    assert digest_of(weights) == before


def test_a_renamed_directory_keeps_its_digest(weights: Path, tmp_path: Path) -> None:
    cache = Cache()
    before = content_digest(weights, cache=cache)
    moved = weights.rename(tmp_path / "elsewhere")
    assert content_digest(moved, cache=cache) == digest_of(moved) == before


def test_a_snapshot_of_links_is_as_the_files_themselves(weights: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    (snapshot / "sub").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "sub/adapter.bin"):
        (snapshot / name).symlink_to(weights / name)
    assert digest_of(snapshot) == digest_of(weights)
    flip(weights / "model.safetensors", 3)
    assert digest_of(snapshot) == digest_of(weights)


def test_a_single_file_is_its_name_and_bytes(weights: Path) -> None:
    file = weights / "model.safetensors"
    before = digest_of(file)
    assert before == digest_of(file)
    flip(file, 0)
    changed = digest_of(file)
    assert changed != before
    assert digest_of(file.rename(weights / "other.safetensors")) != changed


def test_the_cache_is_private_and_spares_the_next_process_the_reading(
    weights: Path, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "cache.json"
    first = Cache(path)
    before = content_digest(weights, cache=first)
    assert sorted(first.read) == ["adapter.bin", "config.json", "model.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["cache.json"]
    second = Cache(path)
    assert content_digest(weights, cache=second) == before
    assert second.read == []


def test_only_the_changed_file_is_read_again(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    content_digest(weights, cache=Cache(path))
    time.sleep(_TICK_S)
    flip(weights / "config.json", 0)
    cache = Cache(path)
    content_digest(weights, cache=cache)
    assert cache.read == ["config.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_changed_just_now_is_read_every_time(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    cache = FileDigestCache(path)
    before = content_digest(weights, cache=cache)
    flip(weights / "model.safetensors", 5)
    assert content_digest(weights, cache=cache) == digest_of(weights) != before
    assert not path.exists()


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"{", b"null", b"[]", b'"text"', b"7", b"\xff\xfe\x00", b"[" * 200_000, b"{}",
        b'{"entries": 1}', b'{"entries": []}', b'{"entries": {"a": 1}}',
    ],
    ids=range(12),
)  # fmt: skip
def test_a_broken_cache_is_ignored_and_rewritten(
    weights: Path, tmp_path: Path, damage: bytes
) -> None:
    path = tmp_path / "cache.json"
    path.write_bytes(damage)
    path.chmod(0o600)
    assert content_digest(weights, cache=Cache(path)) == digest_of(weights)
    again = Cache(path)
    assert content_digest(weights, cache=again) == digest_of(weights)
    assert again.read == []


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_cache_that_others_may_write_is_not_believed(
    weights: Path, tmp_path: Path, mode: int
) -> None:
    path = tmp_path / "cache.json"
    content_digest(weights, cache=Cache(path))
    path.chmod(mode)
    cache = Cache(path)
    assert content_digest(weights, cache=cache) == digest_of(weights)
    assert len(cache.read) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("entry", [None, 1, "x", [], [1], [1, 2, 3, 4], ["a", "b", "c", "d", "e"]])
def test_a_misshapen_entry_of_a_weight_is_not_believed(
    weights: Path, tmp_path: Path, entry: object
) -> None:
    path = tmp_path / "cache.json"
    name = os.path.realpath(weights / "config.json")
    path.write_text(json.dumps({"version": 1, "entries": {name: entry}}))
    path.chmod(0o600)
    assert content_digest(weights, cache=Cache(path)) == digest_of(weights)


def test_a_cache_that_can_not_be_written_is_no_error(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = Cache(tmp_path / "file" / "cache.json")
    assert content_digest(weights, cache=cache) == digest_of(weights)


def test_where_nothing_counts_there_is_no_identity(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    only_text = tmp_path / "text"
    only_text.mkdir()
    (only_text / "README.md").write_text("no weights")
    for path in (empty, only_text, tmp_path / "missing"):
        with pytest.raises(ConfigError):
            digest_of(path)
