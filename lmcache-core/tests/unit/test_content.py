"""Content digests: the same weights have one digest, other weights have another."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from lmcache_core import content
from lmcache_core.content import FileDigestCache, content_digest
from lmcache_core.sdk import ConfigError

_TICK_S = 0.05
"""Longer than the granularity of a file's times."""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    top = tmp_path / "model"
    (top / "sub").mkdir(parents=True)
    (top / "config.json").write_text('{"layers": 2}')
    (top / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    (top / "sub" / "adapter.bin").write_bytes(b"adapter")
    time.sleep(_TICK_S)
    return top


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read through."""
    seen: list[str] = []
    real = content._sha256

    def spy(path: str) -> str:
        seen.append(os.path.basename(path))
        return real(path)

    monkeypatch.setattr(content, "_sha256", spy)
    return seen


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
    cache = FileDigestCache(path)
    before = content_digest(weights, cache=cache)
    file = weights / "model.safetensors"
    found = file.stat()
    flip(file, at)
    if put_mtime_back:
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
        assert file.stat().st_mtime_ns == found.st_mtime_ns
    after = content_digest(weights, cache=None)
    assert after != before
    assert content_digest(weights, cache=FileDigestCache(path)) == after
    assert content_digest(weights, cache=cache) == after


def test_a_byte_put_back_is_the_old_digest_again(weights: Path) -> None:
    before = content_digest(weights)
    flip(weights / "model.safetensors", 7)
    assert content_digest(weights) != before
    flip(weights / "model.safetensors", 7)
    assert content_digest(weights) == before


@pytest.mark.parametrize(
    "change",
    ["renamed", "added", "removed", "moved", "swapped"],
)
def test_names_and_the_set_of_files_are_part_of_the_digest(weights: Path, change: str) -> None:
    before = content_digest(weights)
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
    assert content_digest(weights) != before


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
        "vocab.txt", "merges.txt", "README.md", "readme.txt", "LICENSE", "License.txt", "NOTES.md",
        "generation_config.json", "chat_template.jinja", ".gitattributes", ".cache/state.json",
        "sub/tokenizer.model", "sub/.hidden",
    ],
)  # fmt: skip
def test_files_that_change_no_kv_page_do_not_count(weights: Path, name: str) -> None:
    before = content_digest(weights)
    file = weights / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("one")
    assert content_digest(weights) == before
    file.write_text("another")
    assert content_digest(weights) == before


def test_a_renamed_directory_keeps_its_digest(weights: Path, tmp_path: Path) -> None:
    cache = FileDigestCache(None)
    before = content_digest(weights, cache=cache)
    moved = weights.rename(tmp_path / "elsewhere")
    assert content_digest(moved, cache=cache) == content_digest(moved) == before


def test_a_snapshot_of_links_is_as_the_files_themselves(weights: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    (snapshot / "sub").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "sub/adapter.bin"):
        (snapshot / name).symlink_to(weights / name)
    assert content_digest(snapshot) == content_digest(weights)
    flip(weights / "model.safetensors", 3)
    assert content_digest(snapshot) == content_digest(weights)


def test_a_single_file_is_its_name_and_bytes(weights: Path) -> None:
    file = weights / "model.safetensors"
    before = content_digest(file)
    assert before == content_digest(file)
    flip(file, 0)
    changed = content_digest(file)
    assert changed != before
    assert content_digest(file.rename(weights / "other.safetensors")) != changed


def test_the_cache_is_private_and_spares_the_next_process_the_reading(
    weights: Path, tmp_path: Path, reads: list[str]
) -> None:
    path = tmp_path / "new" / "cache.json"
    before = content_digest(weights, cache=FileDigestCache(path))
    assert sorted(reads) == ["adapter.bin", "config.json", "model.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["cache.json"]
    reads.clear()
    assert content_digest(weights, cache=FileDigestCache(path)) == before
    assert reads == []


def test_only_the_changed_file_is_read_again(
    weights: Path, tmp_path: Path, reads: list[str]
) -> None:
    path = tmp_path / "cache.json"
    content_digest(weights, cache=FileDigestCache(path))
    reads.clear()
    flip(weights / "config.json", 0)
    content_digest(weights, cache=FileDigestCache(path))
    assert reads == ["config.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"{", b"null", b"[]", b'"text"', b"7", b"\xff\xfe\x00", b'{"a": 1}', b'{"a": []}',
        b'{"a": [1, 2]}',
    ],
)  # fmt: skip
def test_a_broken_cache_is_ignored_and_rewritten(
    weights: Path, tmp_path: Path, reads: list[str], damage: bytes
) -> None:
    before = content_digest(weights)
    path = tmp_path / "cache.json"
    path.write_bytes(damage)
    assert content_digest(weights, cache=FileDigestCache(path)) == before
    reads.clear()
    assert content_digest(weights, cache=FileDigestCache(path)) == before
    assert reads == []


@pytest.mark.parametrize("entry", [[], [1], [1, 2, 3, 4], ["a", "b", "c", "d", "e"]])
def test_a_misshapen_entry_of_a_weight_is_not_believed(
    weights: Path, tmp_path: Path, entry: list[object]
) -> None:
    before = content_digest(weights)
    path = tmp_path / "cache.json"
    cache = FileDigestCache(path)
    cache._entries = {os.path.realpath(weights / "config.json"): entry}
    cache._changed = True
    cache.save()
    assert content_digest(weights, cache=FileDigestCache(path)) == before


def test_a_cache_that_can_not_be_written_is_no_error(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = FileDigestCache(tmp_path / "file" / "cache.json")
    assert content_digest(weights, cache=cache) == content_digest(weights)


def test_where_nothing_counts_there_is_no_identity(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    only_text = tmp_path / "text"
    only_text.mkdir()
    (only_text / "README.md").write_text("no weights")
    for path in (empty, only_text, tmp_path / "missing"):
        with pytest.raises(ConfigError):
            content_digest(path)
