"""Backends that are missing, broken or made for another core: one clear error each.

The distributions are real ones, written into a directory on the path.
"""

from __future__ import annotations

import importlib
import logging
import sys
import time
from pathlib import Path

import pytest

from lmcache_core import plugins
from lmcache_core.metrics import Metrics
from lmcache_core.sdk import ConfigError, HostServices, MemoryKind, Region

INFO = """
from lmcache_core.sdk import *
@hookimpl
def lmcache_backend_info():
    return BackendInfo(name="third", version="1", schemes=("third",), api_min={api_min},
                       api_tested=(0, 9), options=(OptionSpec(name="depth", type=int, default=4),))
"""
PROBE = """
@hookimpl
def lmcache_probe(url, options):
    {probe}
"""
STORE = """
class Store(BatchLoop):
    capabilities = Capabilities({claims})
    def exists_one(self, key, timeout_s): return False
    def get_one(self, key, target, timeout_s): return None
    def put_one(self, key, source, timeout_s): pass
    def delete_one(self, key, timeout_s): pass
    def health(self, ctx): return Health(ok=True)
"""
OPEN = """
@hookimpl
def lmcache_open_connector(url, options, host):
    {opens}
"""


def source(
    *,
    api_min: str = "(0, 9)",
    probe: str = "return Probe(usable=True, reason='fine')",
    claims: str = "",
    opens: str = "return Store('third')",
) -> str:
    parts = (INFO, PROBE, STORE, OPEN)
    values = {"api_min": api_min, "probe": probe, "claims": claims, "opens": opens}
    return "".join(part.format(**values) for part in parts)


class Site:
    """A directory of installed distributions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(
        self,
        text: str,
        *,
        dist: str = "lmcache-third",
        requires: str = "",
        group: str = "lmcache.backends.v1",
    ) -> str:
        module = dist.replace("-", "_")
        (self.path / f"{module}.py").write_text(text)
        info = self.path / f"{module}-1.0.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n"
        metadata += f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(metadata)
        (info / "entry_points.txt").write_text(f"[{group}]\nthird = {module}\n")
        importlib.invalidate_caches()
        return module


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in [n for n in sys.modules if n.startswith("lmcache_third")]:
        monkeypatch.delitem(sys.modules, name)
    return Site(tmp_path)


@pytest.fixture
def host(tmp_path: Path) -> HostServices:
    return HostServices(
        logger=logging.getLogger("test"),
        counter=Metrics().counter,
        clock=time.monotonic,
        tmp_dir=tmp_path,
        regions=lambda: (Region(1, 0, 4096, MemoryKind.HOST),),
        on_region_added=lambda callback: None,
        on_region_removed=lambda callback: None,
        released=lambda token: None,
    )


def refusal(host: HostServices, url: str = "third://x") -> str:
    with pytest.raises(ConfigError) as caught:
        plugins.open_connector(url, host)
    assert caught.value.hint, "every refusal names the fix"
    return str(caught.value)


def test_a_good_backend_opens_and_nothing_is_loaded_to_find_it(
    site: Site, host: HostServices
) -> None:
    module = site.install(source())
    assert plugins.installed()["third"].distribution == "lmcache-third"
    assert module not in sys.modules
    opened = plugins.open_connector("third://x?depth=8", host)
    opened.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mooncake://localhost", "pip install 'lmcache-backend-mooncake[cpu]'"),
        ("nixl+posix:///x", "pip install 'lmcache-backend-nixl[cu12]'"),
        ("fil:///x", "file://"),
        ("no-colon", "scheme"),
    ],
)
def test_an_unknown_scheme_names_the_package_or_the_nearest(
    host: HostServices, url: str, words: str
) -> None:
    assert words in refusal(host, url)


@pytest.mark.parametrize(
    ("query", "words"),
    [("dept=1", "'depth'"), ("depth=deep", "int"), ("depth=1&depth=2", "twice")],
)
def test_a_wrong_option_is_refused(site: Site, host: HostServices, query: str, words: str) -> None:
    site.install(source())
    with pytest.raises(ConfigError, match=words):
        plugins.open_connector(f"third://x?{query}", host)


def test_two_packages_with_one_scheme_are_both_named(site: Site, host: HostServices) -> None:
    site.install(source())
    site.install(source(), dist="lmcache-third-fork")
    text = refusal(host)
    assert "lmcache-third" in text
    assert "lmcache-third-fork" in text
    assert "pip uninstall" in text


@pytest.mark.parametrize(
    ("text", "requires", "words"),
    [
        ("import nosuchmodule", "", "nosuchmodule"),
        ("from lmcache_core.sdk import NotYet", "", 'pip install -U "lmcache-core"'),
        ("1/0", "", "ZeroDivisionError"),
        (source(), "lmcache-core>=99", 'pip install -U "lmcache-core>=99"'),
        (source(), "lmcache_core <0.5", 'pip install -U "lmcache-third"'),
        (source(api_min="(0, 99)"), "", "contract 0.99"),
        (source(api_min="(2, 0)"), "", "contract 2.0"),
        (source().replace("lmcache_probe", "lmcache_prob"), "", "lmcache_prob"),
        (source().replace("(url, options):", "(url, options, extra):"), "", "extra"),
        (INFO.format(api_min="(0, 9)") + STORE.format(claims=""), "", "lmcache_probe"),
        (source(opens="return object()"), "", "RemoteConnector"),
        (source(claims="scan=True"), "", "scan"),
        (source(opens="raise ValueError('native trouble')"), "", "native trouble"),
    ],
    ids=[
        "import-error", "newer-sdk", "raises-at-import", "needs-newer-core", "needs-older-core",
        "newer-contract", "other-major", "misspelt-hook", "extra-argument", "missing-hook",
        "wrong-class", "claim-without-protocol", "open-raises",
    ],
)  # fmt: skip
def test_a_broken_backend_is_one_clear_error(
    site: Site, host: HostServices, text: str, requires: str, words: str
) -> None:
    site.install(text, requires=requires)
    assert words in refusal(host)


def test_a_refusal_names_the_module_s_file(site: Site, host: HostServices) -> None:
    site.install(source(claims="scan=True"))
    assert str(site.path / "lmcache_third.py") in refusal(host)


def test_a_backend_made_for_an_older_minor_works(site: Site, host: HostServices) -> None:
    """It knows nothing of what was added since: every default means "not claimed"."""
    older = source(api_min="(0, 1)").replace("api_tested=(0, 9)", "api_tested=(0, 1)")
    site.install(older, requires="lmcache-core>=0.1,<1")
    opened = plugins.open_connector("third://x", host)
    assert opened.capabilities.checksums is False
    opened.close()


def test_a_backend_of_another_major_is_not_loaded(site: Site, host: HostServices) -> None:
    module = site.install(source(), group="lmcache.backends.v2")
    text = refusal(host)
    assert "another contract" in text
    assert 'pip install -U "lmcache-core" "lmcache-third"' in text
    assert module not in sys.modules


def test_a_broken_backend_hurts_only_itself(site: Site, host: HostServices, tmp_path: Path) -> None:
    site.install("1/0")
    plugins.open_connector(f"file://{tmp_path}/kv", host).close()


def test_a_password_is_never_shown(site: Site, host: HostServices) -> None:
    site.install(source(opens="raise ValueError('no')"))
    assert "hunter2" not in refusal(host, "third://user:hunter2@h")


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        ("return Probe(usable=False, reason='no driver', hint='install it')", "no driver"),
        ("import os; os._exit(3)", "failed"),
        ("raise RuntimeError('odd')", "odd"),
        ("import time; time.sleep(60)", "2.0 s"),
    ],
    ids=["says-no", "crashes", "raises", "hangs"],
)
def test_a_probe_runs_in_a_child_that_is_killed_in_time(site: Site, probe: str, words: str) -> None:
    site.install(source(probe=probe))
    answer = plugins.probe("third://x")
    assert not answer.usable
    assert words in answer.reason
