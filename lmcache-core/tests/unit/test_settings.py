"""Where settings come from, LMCache's own keys, and `lmc config` and `lmc init`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lmcache_core.cli.app import app
from lmcache_core.cli.config import key_table
from lmcache_core.config import EngineConfig
from lmcache_core.lmcache_keys import KEYS
from lmcache_core.sdk import ConfigError
from lmcache_core.settings import OWN_KEYS, Settings, load_settings
from lmcache_core.url import redact

ROOT = Path(__file__).parents[3]
# Names of LMCache 0.5.6, lmcache/v1/config.py.
NAMES = Path(__file__).with_name("lmcache-0.5.6-keys.txt").read_text().split()


def load(
    tmp_path: Path,
    *,
    file: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
    extra: dict[str, Any] | None = None,
) -> Settings:
    variables = dict(environ or {})
    if file is not None:
        (tmp_path / "kv.yaml").write_text(yaml.safe_dump(file))
        variables["LMCACHE_CONFIG_FILE"] = str(tmp_path / "kv.yaml")
    return load_settings(extra, variables)


def test_later_sources_win_and_are_named(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        file={"chunk_size": 1, "copy_threads": 1, "store_decode": False},
        environ={"LMCACHE_CHUNK_SIZE": "2", "LMCACHE_COPY_THREADS": "2"},
        extra={"chunk_size": 3},
    )
    config = settings.config
    assert (config.chunk_size, config.copy_threads, config.store_decode) == (3, 2, False)
    assert settings.sources == {
        "chunk_size": "kv_connector_extra_config",
        "copy_threads": "variable LMCACHE_COPY_THREADS",
        "store_decode": str(tmp_path / "kv.yaml"),
    }


VALUES = {
    "host_bytes": st.integers(1, 1 << 40),
    "chunk_size": st.integers(1, 1 << 20),
    "hash_algorithm": st.sampled_from(["sha256", "blake3"]),
    "store_decode": st.booleans(),
    "lookup_deadline_s": st.floats(0.001, 3600),
    "write_ahead_bytes": st.integers(0, 1 << 40),
    "max_prefetch_bytes": st.integers(0, 1 << 40),
    "load": st.sampled_from(["auto", "sync", "async"]),
    "numa_node": st.integers(-1, 7),
}


@given(st.fixed_dictionaries({}, optional=VALUES), st.sampled_from(["variables", "extra"]))
def test_every_value_arrives_from_every_source(values: dict[str, Any], source: str) -> None:
    variables = {f"LMCACHE_{k.upper()}": json.dumps(v) for k, v in values.items()}
    settings = load_settings({}, variables) if source == "variables" else load_settings(values, {})
    plain = msgspec.to_builtins(settings.config)
    assert {name: plain[name] for name in values} == values
    assert set(settings.sources) == set(values)


def test_tiers_can_be_given_in_a_variable(tmp_path: Path) -> None:
    text = '[{"host": "1GiB"}, {"url": "redis://cache:6379", "threads": 2}]'
    settings = load(tmp_path, environ={"LMCACHE_TIERS": text})
    assert settings.config.host_bytes == 1 << 30
    assert settings.config.tiers[0].threads == 2
    assert settings.sources["host_bytes"] == "variable LMCACHE_TIERS"


def test_a_later_source_changes_the_host_tier_of_a_file_alone(tmp_path: Path) -> None:
    file = {"tiers": [{"host": "2GiB"}, {"url": "file:///kv", "size": "1GiB"}]}
    settings = load(tmp_path, file=file, environ={"LMCACHE_HOST_BYTES": "1GiB"})
    assert settings.config.host_bytes == 1 << 30
    assert settings.config.tiers[0].url == "file:///kv"
    assert settings.sources["host_bytes"] == "variable LMCACHE_HOST_BYTES"


def test_an_empty_variable_is_none(tmp_path: Path) -> None:
    assert load(tmp_path, environ={"LMCACHE_CHUNK_SIZE": ""}).sources == {}


def test_the_engine_may_mark_keys_as_lmcache_does(tmp_path: Path) -> None:
    extra = {"lmcache.chunk_size": 64, "lmcache.lookup_timeout_ms": 500}
    config = load(tmp_path, extra=extra).config
    assert (config.chunk_size, config.lookup_deadline_s) == (64, 0.5)
    with pytest.raises(ConfigError, match="with and without"):
        load(tmp_path, extra={"lmcache.chunk_size": 1, "chunk_size": 2})


def test_a_path_reaches_the_file_tier_as_it_is(tmp_path: Path) -> None:
    file = {"local_disk": "/k v?x=1#a%20", "max_local_disk_size": 1}
    url = load(tmp_path, file=file).config.tiers[0].url
    assert unquote(urlsplit(url).path) == "/k v?x=1#a%20"


@pytest.mark.parametrize("text", ["remote_url: @hush", "[{x: @}, hush", "chunk_size: 2024-99-99"])
def test_a_broken_text_is_placed_but_not_quoted(tmp_path: Path, text: str) -> None:
    (tmp_path / "kv.yaml").write_text(f"#\n{text}\n")
    for environ in ({"LMCACHE_CONFIG_FILE": str(tmp_path / "kv.yaml")}, {"LMCACHE_TIERS": text}):
        if "chunk_size" in text:
            environ = {"LMCACHE_CONFIG_FILE": str(tmp_path / "kv.yaml")}
        with pytest.raises(ConfigError, match="not YAML") as caught:
            load_settings({}, environ)
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize(("url", "shown"), [
    ("redis://u:hush@h:1/0?password=hush&db=1", "redis://u:***@h:1/0?password=***&db=***"),
    ("redis://:hu/s@h@h:1", "redis://:***@h:1"), ("s3://hush@bucket", "s3://***@bucket"),
    ("redis://h:6379/0", "redis://h:6379/0"), ("file:///a:b/c@d", "file:///a:b/c@d"),
])  # fmt: skip
def test_urls_are_shown_without_secrets(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_the_table_has_every_key_of_lmcache() -> None:
    assert sorted(KEYS) == sorted(NAMES)
    assert {key.fate for key in KEYS.values()} == {"mapped", "ignored", "refused"}


def test_a_configuration_of_lmcache_works_as_it_is(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        file={
            "chunk_size": 128,
            "local_cpu": True,
            "max_local_cpu_size": 2.5,
            "local_disk": "file:///nvme/kv/",
            "max_local_disk_size": 10,
            "remote_url": "redis://user:secret@cache:6379",
            "remote_serde": "naive",
            "save_unfull_chunk": True,
            "lookup_timeout_ms": 500,
            "blocking_timeout_secs": 3,
            "use_layerwise": True,
            "enable_pd": False,
        },
        environ={"LMCACHE_ENABLE_ASYNC_LOADING": "true"},
    )
    config = settings.config
    assert (config.chunk_size, config.host_bytes) == (128, 5 << 29)
    assert [(t.url, t.size_bytes, t.deadline_s) for t in config.tiers] == [
        ("file:///nvme/kv", 10 << 30, 3.0),
        ("redis://user:secret@cache:6379", 0, 3.0),
    ]
    assert (config.store_partial_chunk, config.lookup_deadline_s) == (True, 0.5)
    assert config.load == "async"
    assert settings.sources["load"] == (
        "variable LMCACHE_ENABLE_ASYNC_LOADING (enable_async_loading)"
    )
    assert [text for text in settings.warnings if "use_layerwise" in text]
    assert len(settings.warnings) == 1


@pytest.mark.parametrize(("old", "new"), [
    ("mooncakestore://m:50051", "mooncake://m:50051"), ("infinistore://i:1", "infinistore://i:1"),
    ("valkey://v:1", "redis://v:1"), ("resp://u:p,w@v:1", "redis://u:p,w@v:1"),
    ("fs://host:0/kv", "file:///kv"), ("s3://bucket", "s3://bucket"),
])  # fmt: skip
def test_remote_urls_become_tiers(tmp_path: Path, old: str, new: str) -> None:
    assert load(tmp_path, extra={"remote_url": old}).config.tiers[0].url == new


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"chunk_sise": 1}, "chunk_size"),
        ({"max_local_cpu_sise": 1}, "max_local_cpu_size"),
        ({"chunk_size": "many"}, "int"),
        ({"remote_url": "redis://h:1", "remote_serde": "kivi"}, "no codec here"),
        ({"enable_blending": True}, "output"),
        ({"enable_pd": True}, "pd-proxy"),
        ({"storage_plugins": ["mine"]}, "backend package"),
        ({"run_script_api_enabled": True}, "code"),
        ({"remote_config_url": "http://a"}, "network"),
        ({"remote_url": "lm://a:1"}, "no backend serves lm://"),
        ({"local_disk": "relative"}, "absolute"),
        ({"local_disk": "/a,/b"}, "one tier a directory"),
        ({"max_local_cpu_size": "big"}, "not a number"),
        ({"local_disk": "/a"}, "no disk tier"),
        ({"local_disk": "redis://u:hush@h"}, "absolute"),
        ({"gds_path": "relative"}, "absolute"),
        ({"max_local_cpu_size": float("inf")}, "not a number"),
        ({"max_local_cpu_size": True}, "not a number"),
        ({"max_local_cpu_size": 0}, "max_local_cpu_size"),
        ({"lookup_timeout_ms": 0}, "lookup_timeout_ms"),
        ({"enable_async_loading": "maybe"}, "neither true nor false"),
        ({"remote_url": "redis://a:1,b:2"}, "several hosts"),
        ({"remote_url": "secret"}, "not a URL"),
        ({"plugin_locations": ["/a.py"]}, "code"),
        ({"host_bytes": "9" * 400}, "not a size"),
        ({"host_bytes": 1, "tiers": [{"host": 1}]}, "same thing"),
        ({"lookup_deadline_s": 1, "lookup_timeout_ms": 500}, "same thing"),
        ({"blocking_timeout_secs": 1, "tiers": [{"url": "file:///b"}]}, "same thing"),
        (
            {"local_disk": "/a", "max_local_disk_size": 1, "tiers": [{"url": "file:///b"}]},
            "same thing",
        ),
        ({"max_local_cpu_size": 1, "tiers": [{"host": "1GiB"}]}, "same thing"),
        ({"max_local_cpu_size": 1, "host_bytes": 1}, "same thing"),
    ],
)
@pytest.mark.parametrize("source", ["file", "extra"])
def test_a_mistake_is_named_with_its_place_and_the_fix(
    tmp_path: Path, values: dict[str, Any], words: str, source: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **{source: values})
    assert words in str(caught.value)
    assert caught.value.hint
    assert "hush" not in str(caught.value)
    if source == "file":
        assert "kv.yaml" in str(caught.value)


def test_a_misspelt_variable_is_an_error_and_a_foreign_one_a_warning(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LMCACHE_CHUNK_SIZES") as caught:
        load(tmp_path, environ={"LMCACHE_CHUNK_SIZES": "1"})
    assert "LMCACHE_CHUNK_SIZE?" in caught.value.hint
    settings = load(tmp_path, environ={"LMCACHE_SERVER_SERVICE_HOST": "10.0.0.1"})
    assert "LMCACHE_SERVER_SERVICE_HOST" in settings.warnings[0]
    with pytest.raises(ConfigError, match="LMCACHE_TIERS"):
        load(tmp_path, environ={"LMCACHE_TIERS": "[{"})


def run(*args: str, **environ: str) -> Any:
    return CliRunner().invoke(app, args, env=environ)


def test_config_show_hides_secrets_and_names_sources(tmp_path: Path) -> None:
    file = tmp_path / "kv.yaml"
    file.write_text("tiers: [{url: 'unix:///s?password=hush'}, {url: 'redis://u:hush@h:1'}]\n")
    done = run("config", "show", "--file", str(file), "--json", LMCACHE_CHUNK_SIZE="64")
    assert done.exit_code == 0, done.output
    assert "hush" not in done.output
    rows = {row["key"]: row for row in json.loads(done.stdout)}
    assert rows["chunk_size"] == {
        "key": "chunk_size", "value": 64, "source": "variable LMCACHE_CHUNK_SIZE",
    }  # fmt: skip
    assert rows["tiers[0].url"]["source"] == str(file)
    assert rows["tiers[0].threads"]["source"] == "default"
    assert set(OWN_KEYS) - {"tiers"} <= set(rows)


def test_config_show_fails_with_the_error_and_its_hint() -> None:
    done = run("config", "show", LMCACHE_ENABLE_PD="true")
    assert done.exit_code == 2
    assert "enable_pd" in done.output and "hint:" in done.output


def test_init_writes_what_can_be_read_and_replaces_only_when_told(tmp_path: Path) -> None:
    out = tmp_path / "kv.yaml"
    done = run("init", "--out", str(out), "--dir", str(tmp_path / "kv"))
    assert done.exit_code == 0, done.output
    assert out.stat().st_mode & 0o777 == 0o600
    config = load_settings({}, {"LMCACHE_CONFIG_FILE": str(out)}).config
    assert config.tiers[0].url.startswith(f"file://{tmp_path}/kv")
    assert config.host_bytes >= 1 << 30
    assert run("init", "--out", str(out), "--dir", str(tmp_path)).exit_code == 2
    assert run("init", "--out", str(out), "--dir", str(tmp_path), "--force").exit_code == 0
    assert run("init", "--out", str(out), "--dir", "/nonexistent/a/b").exit_code == 2


def test_the_docs_show_the_table_and_every_key_of_ours() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert key_table() in text, "put the output of lmc config keys --markdown there"
    for name in EngineConfig.__struct_fields__:
        assert f"`{name}`" in text, name


def test_lmcaches_serde_becomes_the_codec_of_its_tier(tmp_path: Path) -> None:
    extra = {"remote_url": "redis://h:1", "remote_serde": "cachegen"}
    assert load(tmp_path, extra=extra).config.tiers[0].codec == "cachegen"
    ours = {"tiers": [{"url": "redis://h:1"}], "remote_serde": "naive"}
    assert load(tmp_path, extra=ours).config.tiers[0].codec == ""


def test_the_configurations_of_the_transport_guide_can_be_read(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "transport.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for number, block in enumerate(blocks):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        config = load_settings({}, {"LMCACHE_CONFIG_FILE": str(file)}).config
        assert config.channel and config.channel_token_file
