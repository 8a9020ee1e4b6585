"""Stores on disk and on a small file system, and a libcuda without a device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gds_support import MIB, open_url

from lmcache_backend_gds import stub
from lmcache_backend_gds.connector import GdsConnector
from lmcache_conformance.child import Child
from lmcache_conformance.frame import Inconclusive
from lmcache_conformance.harness import small_disk, unmount
from lmcache_conformance.rig import Host


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def opened(host: Host) -> Iterator[Callable[[str], GdsConnector]]:
    """Opens connectors, which are closed at the end."""
    live: list[GdsConnector] = []

    def open_one(url: str) -> GdsConnector:
        live.append(open_url(url, host))
        return live[-1]

    yield open_one
    for connector in live:
        connector.close()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 8 MiB."""
    folder = tmp_path / "small"
    try:
        small_disk(folder, 8 * MIB)
    except Inconclusive as error:
        pytest.skip(str(error))
    yield folder
    unmount(folder)


@pytest.fixture(scope="session")
def stub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a libcuda.so.1 without a device."""
    folder = tmp_path_factory.mktemp("libcuda")
    stub.build(folder)
    return folder


@pytest.fixture
def child(
    stub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Child]]:
    """Opens a URL in a process of its own, under the I/O shim, where the stub is the driver."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(stub_folder))
    live: list[Child] = []

    def start(url: str) -> Child:
        live.append(Child(url, "", tmp_path, preload=True))
        return live[-1]

    yield start
    for each in live:
        each.close()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What a connector logs, from INFO on."""
    caplog.set_level(logging.INFO, "lmcache_conformance.backend")
    return caplog
