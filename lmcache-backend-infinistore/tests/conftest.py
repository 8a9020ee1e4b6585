"""Real servers, one for the whole run where a test does not harm it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from infinistore_support import Open, Opened

from lmcache_backend_infinistore.server import InfinistoreServer


@pytest.fixture(scope="session")
def shared_server() -> Iterator[InfinistoreServer]:
    with InfinistoreServer() as server:
        yield server


@pytest.fixture
def server() -> Iterator[InfinistoreServer]:
    with InfinistoreServer() as server:
        yield server


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens connectors, which are closed at the end."""
    live: list[Opened] = []

    def open_one(url: str, **how: Any) -> Opened:
        live.append(Opened(url, tmp_path, **how))
        return live[-1]

    yield open_one
    for each in live:
        each.store.close()
