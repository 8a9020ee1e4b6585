"""What is told before and at open: options, the probe, what moves the bytes and why."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gds_support import get, needs_kvikio, put

from lmcache_backend_gds import driver, stub
from lmcache_backend_gds.connector import GdsConnector
from lmcache_backend_gds.driver import Found
from lmcache_backend_gds.plugin import OPTIONS
from lmcache_conformance import within
from lmcache_core import plugins
from lmcache_core.sdk import ConfigError, Status

Open = Callable[[str], GdsConnector]
PACKAGE = Path(__file__).parent.parent

NO_KVIKIO = Found(kvikio=False, libcuda=False)
NO_LIBCUDA = Found(kvikio=True, libcuda=False)
BOTH = Found(kvikio=True, libcuda=True)


@pytest.mark.parametrize(
    ("found", "words"),
    [(NO_KVIKIO, "kvikio is not installed"), (NO_LIBCUDA, "libcuda.so.1 can't be loaded")],
)
def test_without_driver_auto_goes_by_system_calls_and_says_so_once(
    tmp_path: Path,
    opened: Open,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
    found: Found,
    words: str,
) -> None:
    monkeypatch.setattr(driver, "look", lambda: found)
    probe = plugins.probe_here(f"gds://{tmp_path}/kv")
    assert probe.usable and words in probe.reason and "[cu13]" in probe.reason
    assert not (tmp_path / "kv").exists()
    store = opened(f"gds://{tmp_path}/kv")
    assert store.health(within(5)).details == {"io": "posix"}
    (line,) = [each.getMessage() for each in log.records]
    assert words in line and "[cu13]" in line and "\n" not in line
    assert put(store, b"k", b"x") is Status.OK
    assert get(store, b"k", 1)[1] == b"x"


@pytest.mark.parametrize("found", [NO_KVIKIO, NO_LIBCUDA])
def test_kvikio_that_is_asked_for_and_lacking_is_one_clear_error(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, found: Found
) -> None:
    monkeypatch.setattr(driver, "look", lambda: found)
    probe = plugins.probe_here(f"gds://{tmp_path}/kv?io=kvikio")
    assert not probe.usable and found.lacking in probe.reason
    with pytest.raises(ConfigError, match=found.lacking) as caught:
        opened(f"gds://{tmp_path}/kv?io=kvikio")
    wanted = "pip install" if found is NO_KVIKIO else "driver"
    assert wanted in caught.value.hint and wanted in probe.hint
    assert not (tmp_path / "kv").exists()


def test_a_driver_without_a_device_is_not_taken_by_auto(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(driver, "look", lambda: BOTH)
    monkeypatch.setattr(driver, "has_device", lambda: False)
    assert plugins.probe_here(f"gds://{tmp_path}/kv").usable
    assert opened(f"gds://{tmp_path}/kv").health(within(5)).details == {"io": "posix"}
    assert "no device" in log.text


def test_posix_that_is_asked_for_logs_nothing(
    tmp_path: Path, opened: Open, log: pytest.LogCaptureFixture
) -> None:
    opened(f"gds://{tmp_path}/kv?io=posix")
    assert not log.records


_LIGHT = """
import sys
from pathlib import Path
from lmcache_conformance.rig import Host, entry_points_of
from lmcache_core import plugins
url = sys.argv[1]
plugins.probe_here(url)
before = "kvikio" in sys.modules
plugins.open_connector(url, Host(Path("/tmp")).services, entry_points_of(url, "")).close()
print(before, "kvikio" in sys.modules, "cupy" in sys.modules)
"""


def test_kvikio_is_imported_only_when_it_is_to_run(tmp_path: Path, stub_folder: Path) -> None:
    """The probe never, the open for ``auto`` only with a device."""
    found = subprocess.run(
        [sys.executable, "-c", _LIGHT, f"gds://{tmp_path}/kv"],
        env={"LD_LIBRARY_PATH": str(stub_folder), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["False", "False", "False"]


@needs_kvikio
def test_the_lean_install_never_imports_cupy(tmp_path: Path, stub_folder: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", _LIGHT, f"gds://{tmp_path}/kv?io=kvikio"],
        env={"LD_LIBRARY_PATH": str(stub_folder), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["False", "True", "False"]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("queue_depth=0", "out of range"), ("queue_depth=65", "out of range"),
        ("task_size_bytes=1000", "out of range"), ("max_stuck=0", "out of range"),
        ("io=cuda", "kvikio"), ("durability=server", "process"), ("direct=maybe", "bool"),
        ("threads=4", "queue_depth"),
    ],
)  # fmt: skip
def test_wrong_options(tmp_path: Path, opened: Open, query: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(f"gds://{tmp_path}/kv?{query}")
    assert words in str(caught.value) and caught.value.hint
    assert not (tmp_path / "kv").exists()


def test_wrong_directories(tmp_path: Path, opened: Open) -> None:
    (tmp_path / "taken").touch()
    for url in ("gds://host/kv", "gds:", f"gds://{tmp_path}/taken", f"gds://{tmp_path}/taken/kv"):
        with pytest.raises(ConfigError) as caught:
            opened(url)
        assert caught.value.hint
        assert not plugins.probe_here(url).usable


def test_the_readme_names_every_option_with_its_default() -> None:
    readme = (PACKAGE / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", readme, re.M))
    assert set(rows) == {option.name for option in OPTIONS}
    for option in OPTIONS:
        default = str(option.default).lower()
        kind, shown, unit, _ = rows[option.name].split(" | ", 3)
        assert (kind, shown.strip("`"), unit.strip()) == (
            option.type.__name__,
            default,
            option.unit,
        )


def test_the_lean_line_pins_what_the_extras_pin() -> None:
    readme = (PACKAGE / "README.md").read_text()
    for extra in re.findall(r"kvikio-cu1[23]==[\d.]+", (PACKAGE / "pyproject.toml").read_text()):
        assert f"{extra} lib{extra}" in readme


def test_the_stub_has_no_device(stub_folder: Path) -> None:
    code = "from lmcache_backend_gds import driver; print(driver.look(), driver.has_device())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"LD_LIBRARY_PATH": str(stub_folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip().endswith("False")
    assert "cuMemAlloc_v2" in stub.source()
