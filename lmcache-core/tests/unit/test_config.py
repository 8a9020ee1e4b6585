"""Configuration: sources, sizes, and one clear error for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmcache_core.config import from_mapping, parse_size
from lmcache_core.sdk import ConfigError
from lmcache_core.settings import load_config


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GiB", 20 << 30), ("500 MB", 500_000_000), ("1.5kib", 1536), (4096, 4096), ("7", 7)],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "5 parsecs", -1, True, None])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_size(text)


def test_the_file_is_read_and_the_engines_own_settings_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kv.yaml"
    file.write_text(
        "chunk_size: 128\ntiers:\n  - host: 1GiB\n  - url: file:///kv\n    size: 2GiB\n"
    )
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(file))
    config = load_config({"chunk_size": 512})
    assert config.chunk_size == 512
    assert config.host_bytes == 1 << 30
    assert [(tier.url, tier.size_bytes) for tier in config.tiers] == [("file:///kv", 2 << 30)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"chunk_sise": 1}, "chunk_size"),
        ({"chunk_size": "many"}, "int"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"lookup_deadline_s": -1}, "lookup_deadline_s"),
        ({"tiers": "file:///kv"}, "list"),
        ({"tiers": ["file:///kv"]}, "mapping"),
        ({"tiers": [{"url": "file:///kv", "sise": 1}]}, "did you mean"),
        ({"tiers": [{"url": "file:///kv", "write": "maybe"}]}, "write"),
        ({"tiers": [{"url": "file:///kv"}, {"host": "1GiB"}]}, "first"),
        ({"tiers": [{"size": "1GiB"}]}, "url"),
        ({"tiers": [{"url": "file:///kv", "size": 1, "size_bytes": 1}]}, "size_bytes"),
        ({"tiers": [{"url": "file:///kv", "threads": 0}]}, "threads"),
        ({"tiers": [{"url": "file:///kv", "deadline_s": -1}]}, "deadline_s"),
        ({"tiers": [{"url": "file:///kv", "size": "big"}]}, "tiers[0]: size_bytes"),
        ({"max_pending_store_bytes": "big"}, "max_pending_store_bytes"),
    ],
)
def test_a_mistake_is_named_with_its_place(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(values)
    assert words in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["- a list", "{unclosed", "5"])
def test_a_broken_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    file = tmp_path / "kv.yaml"
    file.write_text(text)
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(file))
    with pytest.raises(ConfigError, match=r"kv\.yaml"):
        load_config()


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", "/nonexistent/kv.yaml")
    with pytest.raises(ConfigError, match="nonexistent"):
        load_config()


@pytest.mark.parametrize("written", ["http://a:1,http://b:2", ["http://a:1", "http://b:2"]])
def test_addresses_as_a_list_or_with_commas(written: object) -> None:
    assert from_mapping({"controllers": written}).controllers == ("http://a:1", "http://b:2")
