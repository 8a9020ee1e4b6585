"""`lmc init` on machines other than this one."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from typer.testing import CliRunner

from lmcache_core.cli.app import app
from lmcache_core.cli.init import free_memory_bytes
from lmcache_core.settings import load_settings


def test_init_quotes_the_directory(tmp_path: Path) -> None:
    out, directory = tmp_path / "kv.yaml", tmp_path / "a: b #c?d"
    args = ["init", "--out", str(out), "--dir", str(directory)]
    assert CliRunner().invoke(app, args).exit_code == 0
    url = load_settings({}, {"LMCACHE_CONFIG_FILE": str(out)}).config.tiers[0].url
    assert unquote(urlsplit(url).path) == str(directory)


@pytest.mark.parametrize(("limit", "free"), [("max", 8 << 30), (str(2 << 30), 2 << 30)])
def test_init_counts_caches_and_keeps_to_a_containers_limit(
    tmp_path: Path, limit: str, free: int
) -> None:
    for name, text in (
        ("proc/meminfo", f"MemFree: 1 kB\nMemAvailable: {8 << 20} kB\n"),
        ("sys/fs/cgroup/memory.max", f"{limit}\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory_bytes(tmp_path) == free
