"""Where settings come from, LMCache's own keys, and `lmc config` and `lmc init`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
])  # fmt: skip
def test_remote_urls_become_tiers(tmp_path: Path, old: str, new: str) -> None:
    assert load(tmp_path, extra={"remote_url": old}).config.tiers[0].url == new


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"chunk_sise": 1}, "chunk_size"),
        ({"max_local_cpu_sise": 1}, "max_local_cpu_size"),
        ({"chunk_size": "many"}, "int"),
        ({"remote_serde": "cachegen"}, "codecs"),
        ({"enable_blending": True}, "output"),
        ({"enable_pd": True}, "transport"),
        ({"storage_plugins": ["mine"]}, "backend package"),
        ({"run_script_api_enabled": True}, "code"),
        ({"remote_config_url": "http://a"}, "network"),
        ({"remote_url": "lm://a:1"}, "no backend serves lm://"),
        ({"local_disk": "relative"}, "absolute"),
        ({"local_disk": "/a,/b"}, "one tier a directory"),
        ({"max_local_cpu_size": "big"}, "not a number"),
        ({"local_disk": "/a", "tiers": [{"url": "file:///b"}]}, "same thing"),
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
