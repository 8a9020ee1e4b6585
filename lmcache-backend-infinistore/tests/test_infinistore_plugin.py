"""What an operator meets: options, the probe, and what an import does."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
from infinistore_support import Open

from lmcache_backend_infinistore import plugin
from lmcache_backend_infinistore.server import InfinistoreServer
from lmcache_core import plugins
from lmcache_core.sdk import BackendUnavailable, ConfigError

DEFAULTS = {option.name: option.default for option in plugin.OPTIONS}


def probe(url: str, **options: Any) -> Any:
    return plugin.lmcache_probe(url=url, options=DEFAULTS | options)


def test_neither_import_nor_use_loads_the_client_here(shared_server: InfinistoreServer) -> None:
    """Its import sets OMP_NUM_THREADS, and it can kill the process that it is in."""
    program = f"""
import json, os, sys
from pathlib import Path
before = dict(os.environ)
from lmcache_conformance import Memory, within
from lmcache_conformance.rig import Host
from lmcache_core import plugins
store = plugins.open_connector({shared_server.url!r}, Host(Path("/tmp")).services)
memory = Memory.of([b"value"])
assert store.put_from([b"light"], memory.buffers(read_only=True), within(5))[0].name == "OK"
assert store.get_into([b"light"], memory.buffers(), within(5))[0].status.name == "OK"
store.close()
loaded = [n for n in sys.modules if n.partition(".")[0] in ("infinistore", "torch", "uvloop")]
maps = Path("/proc/self/maps").read_text()
print(json.dumps([loaded, "_infinistore" in maps, dict(os.environ) == before]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], False, True]


def test_the_probe_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe("infinistore://").usable
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        missing = probe("infinistore://")
        assert not missing.usable and missing.hint == plugin.INSTALL
        patch.setattr(sys, "version_info", (3, 13, 1, "final", 0))
        newer = probe("infinistore://")
        assert not newer.usable and "3.10, 3.11 or 3.12" in newer.hint
    with monkeypatch.context() as patch:
        patch.setattr(plugin, "_LIBRARY", b"libibverbs.so.99")
        verbs = probe("infinistore://")
        assert not verbs.usable and verbs.hint == "apt-get install libibverbs1"
    with monkeypatch.context() as patch:
        patch.setattr(plugin, "_DEVICES", "/sys/class/no_such_class")
        rdma = probe("infinistore://", connection="rdma")
        assert not rdma.usable and "connection=tcp" in rdma.hint


def test_the_probe_asks_the_server(shared_server: InfinistoreServer) -> None:
    assert plugins.probe(shared_server.url).usable
    nobody = plugins.probe("infinistore://127.0.0.1:1")
    assert not nobody.usable and nobody.hint


def test_without_the_client_open_gives_the_line_to_run(
    shared_server: InfinistoreServer, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        opened(shared_server.url)
    assert caught.value.hint == "pip install 'lmcache-backend-infinistore[client]'"


@pytest.mark.parametrize(
    "tail",
    [
        "helpers=0", "helpers=17", "bounce_bytes=1000", "bounce_bytes=2000000000",
        "start_limit_s=0", "restart_max_s=0", "longest_deadline_s=0", "ib_port=0",
        "connection=udp", "link_type=token-ring", "helpers=many", "speed=high",
    ],
)  # fmt: skip
def test_a_wrong_option_is_named(opened: Open, tail: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(f"infinistore://127.0.0.1:1?{tail}")
    assert tail.partition("=")[0] in str(caught.value) and caught.value.hint


@pytest.mark.parametrize(
    "url",
    ["infinistore://", "infinistore:///x", "infinistore://h:port", "infinistore://h:0",
     "infinistore://u:p@h:1", "infinistore://h:1/x"],
)  # fmt: skip
def test_a_wrong_url_is_refused(opened: Open, url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(url)
    assert caught.value.hint
    assert "p@" not in str(caught.value)


def test_nobody_there_is_unavailable(opened: Open) -> None:
    for url in ("infinistore://127.0.0.1:1", "infinistore://no-such-host.invalid:1"):
        with pytest.raises(BackendUnavailable) as caught:
            opened(url)
        assert caught.value.hint


def test_rdma_without_a_device_is_refused_at_open(
    opened: Open, shared_server: InfinistoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_DEVICES", "/sys/class/no_such_class")
    with pytest.raises(ConfigError) as caught:
        opened(f"{shared_server.url}?connection=rdma")
    assert "connection=tcp" in caught.value.hint


def test_every_option_is_in_the_readme() -> None:
    from pathlib import Path

    text = (Path(__file__).parents[1] / "README.md").read_text()
    for option in plugin.OPTIONS:
        shown = f"`{option.default}`"
        row = next(
            (line for line in text.splitlines() if line.startswith(f"| `{option.name}`")), ""
        )
        assert shown in row and option.type.__name__ in row, option.name
        assert not option.unit or option.unit in row
