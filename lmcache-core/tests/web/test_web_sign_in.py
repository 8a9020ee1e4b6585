"""Who gets in, what is kept of the token, and what happens when the controller is away."""

from __future__ import annotations

import pytest
from browser import Page
from pd_proxy_rig import until
from selenium.webdriver.common.keys import Keys
from stub import World

BROKEN = ["ERR_EMPTY_RESPONSE", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION", "ERR_FAILED"]


def test_a_token_is_asked_and_nothing_is_told_before(any_page: Page) -> None:
    assert any_page.one("#token").is_displayed() and any_page.focused() == "token"
    assert not any_page.one("#board").is_displayed()
    assert not any("/v1/" in url for url in any_page.requested()), "asked without a token"


def test_every_part_of_any_controller_is_shown(any_page: Page) -> None:
    any_page.sign_in()
    for part in ("time", "attention", "instances", "jobs", "pins", "usage", "prefixes", "lookup"):
        assert any_page.one(f"#{part}").is_displayed()
        problems = any_page.all(f"#{part} .problem")
        assert not any(line.is_displayed() for line in problems), part
    assert any_page.text("#status-text") in ("Healthy", "Degraded")


def test_a_wrong_token_is_said_with_the_hint(page: Page) -> None:
    page.expected.append("401")
    page.one("#token").send_keys("wrong", Keys.ENTER)
    page.until_text("#sign-in-error", "not accepted", "controller's token file")
    assert page.focused() == "token" and not page.one("#board").is_displayed()
    assert page.js("return sessionStorage.length") == 0


def test_the_token_is_kept_in_memory_only(board: Page, world: World) -> None:
    assert world.token not in board.driver.current_url
    assert all(world.token not in url for url in board.requested())
    for kept in ("{...localStorage}", "{...sessionStorage}", "document.cookie"):
        assert world.token not in board.js(f"return JSON.stringify({kept})")
    assert board.js("return document.querySelector('#token').value") == ""
    board.driver.refresh()
    until(lambda: board.one("#sign-in").is_displayed(), "it is asked again after a reload")


def test_a_tab_keeps_the_token_when_asked_until_signed_out(page: Page, world: World) -> None:
    page.click("#keep")
    page.sign_in()
    page.driver.refresh()
    page.filled()
    assert page.one("#board").is_displayed()
    world.mode = "away"
    page.expected += BROKEN
    page.driver.refresh()
    page.until_text("#stale-text", "does not answer")
    world.mode = "up"
    page.click("#try-now")
    page.until_text("#instances .count", "7")
    page.click("#sign-out")
    assert page.js("return sessionStorage.length") == 0
    assert not page.one("#board").is_displayed()


def test_a_revoked_token_ends_the_session(board: Page, world: World) -> None:
    board.expected.append("401")
    world.token = "another"
    board.press("r")
    board.until_text("#sign-in-error", "no longer accepted")
    assert not board.one("#board").is_displayed()
    asked = len(world.calls)
    world.token = board.token
    board.sign_in()
    assert len(world.calls) > asked and board.one("#board").is_displayed()


@pytest.mark.parametrize("mode", ["away", "gateway"])
def test_an_absent_controller_is_said_and_found_again(board: Page, world: World, mode: str) -> None:
    board.expected += [*BROKEN, "502"]
    shown = board.text("#instances .table")
    world.mode = mode
    board.press("r")
    board.until_text("#stale-text", "does not answer", "What you see is from")
    assert board.one("#stale").is_displayed() and board.text("#status-text") == "No answer"
    assert board.text("#instances .table") == shown, "what was known stays"
    world.instances = world.instances[:3]
    world.mode = "up"
    # Nothing is pressed: it comes back by itself.
    until(lambda: board.text("#instances .count") == "3", "it did not come back")
    until(lambda: not board.one("#stale").is_displayed())
    assert board.text("#status-text") == "Degraded"


def test_retries_become_rare(board: Page, world: World) -> None:
    board.expected += BROKEN
    world.mode = "away"
    board.requested()
    board.press("r")
    waits = []
    for _ in range(4):
        until(lambda: "Next try in" in board.text("#stale-text"))
        waits.append(int(board.text("#stale-text").split("Next try in ")[1].split(" ")[0]))
        board.js("document.querySelector('#stale-text').textContent = ''")
        board.click("#try-now")
        until(lambda: "does not answer" in board.text("#stale-text"))
    assert waits == sorted(waits) and waits[-1] > 2 * waits[0], waits


def test_one_part_that_fails_leaves_the_others(board: Page, world: World) -> None:
    board.expected.append("500")
    world.broken["/v1/usage"] = 500
    world.instances = world.instances[:2]
    board.refresh()
    board.until_text("#usage .problem", "may be old", "/v1/usage is broken", "Try later.")
    assert not board.one("#stale").is_displayed() and board.text("#instances .count") == "2"
    assert board.all("#usage .table tbody tr"), "what was known stays"
    world.broken.clear()
    until(lambda: (board.refresh(), not board.one("#usage .problem").is_displayed())[1])
