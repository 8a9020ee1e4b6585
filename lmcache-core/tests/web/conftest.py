"""A browser for all tests here, and controllers for it to look at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("selenium", reason="no browser: pip install selenium")

from browser import Page, chromium, missing, opened
from pd_proxy_rig import served
from stub import TOKEN, World, build


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    """One browser; a test takes it through `page` or `any_page`."""
    if reason := missing():
        pytest.skip(reason)
    with chromium() as found:
        yield found


@pytest.fixture
def world() -> World:
    """What the stub tells; a test may change it before and while it is looked at."""
    return World()


@pytest.fixture
def stub_url(world: World) -> Iterator[str]:
    """Where ``world`` is served."""
    with served(build(world)) as url:
        yield url


@pytest.fixture
def page(driver: Any, stub_url: str) -> Iterator[Page]:
    """The page of the stub, not signed in."""
    with opened(driver, stub_url + "/", TOKEN) as found:
        yield found


@pytest.fixture
def board(page: Page) -> Page:
    """The page of the stub, signed in."""
    page.sign_in()
    return page


@pytest.fixture
def controller_url(request: pytest.FixtureRequest) -> tuple[str, str]:
    """URL and token of any controller: that of LMCACHE_WEB_URL and LMCACHE_WEB_TOKEN, else the
    stub's."""
    url = os.environ.get("LMCACHE_WEB_URL")
    if url:
        return url.rstrip("/") + "/", os.environ["LMCACHE_WEB_TOKEN"]
    return request.getfixturevalue("stub_url") + "/", TOKEN


@pytest.fixture
def any_page(driver: Any, controller_url: tuple[str, str]) -> Iterator[Page]:
    """The page of `controller_url`, not signed in."""
    with opened(driver, *controller_url) as found:
        yield found
