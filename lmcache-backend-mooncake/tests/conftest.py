"""Real stores, in a network that nothing outside reaches; shared where no test harms them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from mooncake_support import Open, Opened, connect

from lmcache_backend_mooncake.network import private_network
from lmcache_backend_mooncake.server import MooncakeServer


@pytest.fixture(scope="module", autouse=True)
def network() -> Iterator[None]:
    with private_network():
        yield


@pytest.fixture(scope="module")
def shared_server(network: None) -> Iterator[MooncakeServer]:
    with MooncakeServer() as server:
        yield server


@pytest.fixture
def server() -> Iterator[MooncakeServer]:
    with MooncakeServer() as server:
        yield server


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens connectors, which are closed at the end."""
    live: list[Opened] = []

    def open_one(url: str, **options: Any) -> Opened:
        live.append(connect(url, **options))
        return live[-1]

    yield open_one
    for each in live:
        each.store.close()
