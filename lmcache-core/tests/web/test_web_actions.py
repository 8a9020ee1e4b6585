"""What is sent, once, after a confirmation that says it; and nothing when it is cancelled."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from browser import Page
from canned import GIB, TENANTS, chunk_key
from pd_proxy_rig import until
from selenium.webdriver.common.keys import Keys
from stub import World

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
PLACES = {"source": {"instance": "llama-0", "tier": "host"},
          "target": {"instance": "node-a", "tier": "disk"}}  # fmt: skip
FROM_TO = {"#source-instance": "llama-0", "#source-tier": "host", "#target-instance": "node-a",
           "#target-tier": "disk"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A form as it is filled, what its confirmation says, and what is sent."""

    kind: str
    fields: dict[str, str]
    says: tuple[str, ...]
    body: dict[str, Any]
    path: str = ""
    clicks: tuple[str, ...] = ()
    word: str = ""
    id: str = field(default="")


CASES = [
    Case("pin", {"#action-way": "text", "#action-text": "You are helpful.", "#owner": "ops",
                 "#on": "llama-0, llama-1", "#ttl": "2"},
         ("prompt “You are helpful.”", "host of llama-0 and llama-1", "for 2 h", "owner ops"),
         {"select": {"text": "You are helpful."}, "instances": ["llama-0", "llama-1"],
          "tier": "host", "owner": "ops", "ttl_s": 7200}, path="/v1/pins"),
    Case("copy", {"#action-way": "tokens", "#action-tokens": "[1, 2, 4294967295]", **FROM_TO},
         ("the prefix of 3 token ids", "from host of llama-0 to disk of node-a"),
         {"select": {"tokens": [1, 2, 4294967295]}, **PLACES}),
    Case("move", {"#action-way": "group", "#action-model": MODEL, "#action-by": "id",
                  "#action-id": TENANTS[1], **FROM_TO},
         (f"model {MODEL} of tenant {TENANTS[1]}", "deletes from the source",
          "Now that is 420 chunks"),
         {"select": {"model": MODEL, "tenant_id": TENANTS[1]}, **PLACES}),
    Case("clear", {"#action-way": "group", "#action-by": "none", "#on": "node-a"},
         ("requests without a salt from tier disk of node-a", "can't be undone"),
         {"select": {"tenant": ""}, "instances": ["node-a"], "tiers": ["disk"]},
         clicks=("#tiers [value=disk]",), id="clear-tenant"),
    Case("clear", {"#action-way": "keys", "#action-keys": f"{chunk_key(1)} {chunk_key(2)}"},
         ("Deletes 2 chunks from every tier of every instance",),
         {"select": {"keys": [chunk_key(1), chunk_key(2)]}}, id="clear-keys"),
    Case("clear", {"#action-way": "all"}, ("Deletes everything from every tier of every instance",),
         {"select": {"all": True}}, word="clear", id="clear-all"),
    Case("compress", {"#action-way": "all", "#tier": "disk", "#codec": "zstd", "#level": "fast"},
         ("everything again in tier disk of every instance", "codec zstd at level fast"),
         {"select": {"all": True}, "tier": "disk", "codec": "zstd", "level": "fast"}),
    Case("decompress", {"#action-way": "text", "#action-text": "Hi", "#action-by": "salt",
                        "#action-salt": "s3cret", "#tier": "disk", "#on": "llama-1"},
         ("the tenant whose salt you gave", "tier disk of llama-1, without a codec"),
         {"select": {"text": "Hi", "tenant": "s3cret"}, "tier": "disk", "instances": ["llama-1"]}),
]  # fmt: skip


def fill_in(board: Page, case: Case) -> None:
    board.press("n")
    board.fill("#kind", case.kind)
    for css, value in case.fields.items():
        board.fill(css, value)
    for css in case.clicks:
        board.click(css)
    board.click("#action-form [type=submit]")
    until(lambda: board.one("#confirm").is_displayed(), board.text("#action-form .error"))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id or c.kind)
def test_an_action_sends_what_was_confirmed(board: Page, world: World, case: Case) -> None:
    fill_in(board, case)
    words = board.text("#confirm-words")
    for part in case.says:
        assert part in words
    assert "s3cret" not in words, "salts are not shown"
    if case.word:
        board.click("#confirm-go")
        assert "Type clear" in board.text("#confirm-form .error") and not world.writes()
        board.one("#word").send_keys(case.word)
    board.click("#confirm-go")
    until(lambda: not board.one("#action").is_displayed())
    (sent,) = world.writes()
    assert (sent.method, sent.path) == ("POST", case.path or f"/v1/{case.kind}")
    assert sent.body == case.body
    assert sent.key is not None and len(sent.key) == 32
    new = world.jobs[0].id
    until(lambda: board.all(f'[data-job="{new}"]'), "the job is a row")
    assert "running" in board.one(f'[data-job="{new}"]').text
    board.click(".toast button")
    assert board.js("return document.activeElement.closest('tr').dataset.job") == new
    world.step()
    board.refresh()
    until(lambda: "done: 100 chunks" in board.text("#live"), "its end is said")


@pytest.mark.parametrize("case", CASES[:2] + CASES[5:6], ids=lambda c: c.id or c.kind)
def test_a_cancelled_action_sends_nothing(board: Page, world: World, case: Case) -> None:
    fill_in(board, case)
    board.click("#confirm [data-close]")
    assert board.one("#action").is_displayed(), "the form is still there to change"
    board.click("#action-form [type=submit]")
    board.press(Keys.ESCAPE)
    assert not board.one("#confirm").is_displayed() and board.one("#action").is_displayed()
    board.press(Keys.ESCAPE)
    assert not board.one("#action").is_displayed()
    assert world.writes() == []
    fields = board.all("#action textarea, #action [type=password]")
    kept = {field.get_attribute("value") for field in fields}
    assert kept == {""}, "prompts and salts don't wait for the next visitor"


def test_unpin_cancel_and_quota(board: Page, world: World) -> None:
    def confirmed(*says: str) -> None:
        for part in says:
            assert part in board.text("#confirm-words")
        board.click("#confirm-go")
        until(lambda: not board.one("#confirm").is_displayed())

    pin, running = world.pins[0].id, world.jobs[0].id
    board.click("#pins tbody .do button")
    board.click("#confirm [data-close]")
    assert not world.writes()
    board.click("#pins tbody .do button")
    confirmed("pin-0 of ops", "96 chunks")
    board.click(f'[data-job="{running}"] .do button')
    confirmed(running, "411 of 640 chunks", "stays done")
    until(lambda: "cancelled" in board.one(f'[data-job="{running}"]').text)
    board.click("#quotas .do button")
    assert board.one("#quota-size").get_attribute("value") == "4"
    board.fill("#quota-size", "1.5")
    board.click("#quota-form [type=submit]")
    confirmed(f"tenant {TENANTS[1]}", "at most 1.50 GiB in tier host")
    board.click("#quotas [aria-label^=Remove]")
    confirmed(f"tenant {TENANTS[1]}", "as there is room, not 4.00 GiB")
    until(lambda: len(board.all("#quotas tbody tr")) == 2, "one was set, one removed")
    sent = [(call.method, call.path, call.body) for call in world.writes()]
    assert sent == [
        ("DELETE", f"/v1/pins/{pin}", None), ("POST", f"/v1/jobs/{running}/cancel", None),
        ("PUT", "/v1/quotas", {"tenant_id": TENANTS[1], "tier": "host", "bytes": 3 * GIB // 2}),
        ("DELETE", "/v1/quotas/q-1", None),
    ]  # fmt: skip
    assert len({call.key for call in world.writes()}) == 4 and None not in {
        call.key for call in world.writes()
    }


def test_a_row_fills_the_form(board: Page, world: World) -> None:
    board.click("#instances tbody tr:nth-child(2) .do button")
    assert board.one("#source-instance").get_attribute("value") == "llama-1"
    board.press(Keys.ESCAPE)
    assert board.focused() == "Act on llama-1…"
    row = board.one("#usage .table tbody tr:nth-child(2)")
    assert TENANTS[1] in row.text
    board.click("#usage .table tbody tr:nth-child(2) .do button")
    board.click("#action-form [type=submit]")
    board.click("#confirm-go")
    until(lambda: len(world.writes()) == 1)
    assert world.writes()[0].body == {
        "select": {"model": MODEL, "tenant_id": TENANTS[1]}, "tiers": ["disk"],
    }  # fmt: skip


def test_a_submission_counts_once_whatever_is_pressed(board: Page, world: World) -> None:
    world.hold = asyncio.Event()
    fill_in(board, CASES[1])
    board.js("for (let i = 0; i < 5; i++) arguments[0].click()", board.one("#confirm-go"))
    until(lambda: world.writes())
    board.press(Keys.ESCAPE)
    assert board.one("#confirm").is_displayed(), "what is being sent can't be taken back by Esc"
    board.press("r")
    held, world.hold = world.hold, None
    held.set()
    until(lambda: not board.one("#confirm").is_displayed())
    assert len(world.writes()) == 1


def test_trying_again_has_the_same_key(board: Page, world: World) -> None:
    board.expected += ["ERR_", "409"]
    fill_in(board, CASES[1])
    world.mode = "away"
    board.click("#confirm-go")
    board.until_text("#confirm-form .error", "does not answer", "it counts once")
    assert board.text("#confirm-go") == "Try again"
    world.mode = "up"
    world.broken["/v1/copy"] = 409
    board.click("#confirm-go")
    board.until_text("#confirm-form .error", "/v1/copy is broken. Try later.")
    world.broken.clear()
    board.click("#confirm-go")
    until(lambda: not board.one("#confirm").is_displayed())
    first, second = world.writes()
    assert first.key == second.key and first.body == second.body
    fill_in(board, CASES[1])
    board.click("#confirm-go")
    until(lambda: len(world.writes()) == 3)
    assert world.writes()[2].key != first.key, "a new submission has a new one"


WRONG = [
    ("pin", {"#owner": "ops"}, "prompt's text", "action-text"),
    ("pin", {"#action-text": "x"}, "owner", "owner"),
    ("pin", {"#action-text": "x", "#owner": "ops", "#ttl": "1000"}, "30 days", "ttl"),
    ("copy", {"#action-way": "tokens", "#action-tokens": "1 two"}, "“two” is no", "action-tokens"),
    ("copy", {"#action-way": "tokens", "#action-tokens": "4294967296"}, "is no", "action-tokens"),
    ("copy", {"#action-way": "all", "#target-instance": "llama-0"}, "same place", "target-tier"),
    ("clear", {"#action-way": "group"}, "model or a tenant", "action-model"),
    ("clear", {"#action-way": "keys", "#action-keys": "abc"}, "92 hex digits", "action-keys"),
    ("clear", {"#action-way": "all", "#on": "nobody"}, "“nobody”", "on"),
    ("compress", {"#action-way": "all", "#codec": ""}, "codec", "codec"),
]


def test_a_wrong_form_is_said_at_the_field(board: Page, world: World) -> None:
    for kind, fields, says, at in WRONG:
        board.press("n")
        board.fill("#kind", kind)
        for css, value in fields.items():
            board.fill(css, value)
        board.click("#action-form [type=submit]")
        assert says in board.text("#action-form .error")
        assert board.focused() == at and not board.one("#confirm").is_displayed()
        board.press(Keys.ESCAPE)
    assert world.writes() == []


def test_by_keyboard_alone(page: Page, world: World) -> None:
    page.press(page.token, Keys.ENTER)
    page.filled()
    page.press("?")
    assert page.one("#help").is_displayed() and page.focused() == "Close"
    page.press(Keys.ESCAPE, "j")
    assert page.focused() == "jobs" or page.js("return document.activeElement.id") == "jobs"
    page.tab_to(f"copy {world.jobs[0].id[:8]}…")
    page.press(Keys.ENTER)
    page.until_text("#details-body", "411 of 640")
    page.press(Keys.ESCAPE, "n")
    assert page.focused() == "kind"
    page.press("clear")
    page.tab_to("action-way")
    page.press(Keys.END)
    page.tab_to("Continue…")
    outline = page.js("return getComputedStyle(document.activeElement).outline")
    assert "solid 2px" in outline, "the focus can be seen"
    page.press(Keys.ENTER)
    assert page.focused() == "word"
    page.press("clear", Keys.ENTER)
    until(lambda: world.writes())
    assert world.writes()[0].body == {"select": {"all": True}}
    until(lambda: not page.one("#action").is_displayed())


def test_shortcuts_leave_typing_alone_and_can_be_off(board: Page) -> None:
    board.press("/")
    board.press("n", "t", "?")
    assert board.one("#filter").get_attribute("value") == "nt?"
    assert not board.all("dialog[open]")
    board.js("document.activeElement.blur()")
    board.press("?")
    board.click("#shortcuts-on")
    board.press(Keys.ESCAPE)
    board.js("document.activeElement.blur()")
    board.press("n")
    assert not board.all("dialog[open]")


def test_lookup_of_a_prompt_goes_on_to_an_action(board: Page, world: World) -> None:
    board.fill("#lookup-text", "You are <b>helpful</b>.")
    board.fill("#lookup-model", "m")
    board.click("#lookup-form [type=submit]")
    board.until_text("#lookup-result", "2,085 tokens: 8 whole chunks", "llama-2")
    assert "host 512 · disk 1,024" in board.text("#lookup-result")
    asked = [call.body for call in world.calls if call.path == "/v1/lookup"]
    assert asked == [{"select": {"text": "You are <b>helpful</b>.", "model": "m"}}]
    board.click("#lookup-result .row button")
    assert board.one("#kind").get_attribute("value") == "pin"
    assert board.one("#action-text").get_attribute("value") == "You are <b>helpful</b>."
    board.press(Keys.ESCAPE)
    board.click("#prefixes .do button")
    until(lambda: any(c.body == {"select": {"keys": [chunk_key(0)]}} for c in world.calls))


def test_why_a_request_missed(board: Page, world: World) -> None:
    board.expected.append("404")
    board.fill("#request-id", "cmpl-1/2?")
    board.click("#misses-form [type=submit]")
    board.until_text("#misses-result", "8 of 14 chunks not found", "llama-0")
    rows = [row.text.split("\n")[0] for row in board.all("#misses-result tbody tr")]
    assert len(rows) == 4, "neighbours with one reason are one row"
    assert "6\u20138" in rows[1] and "evicted" in rows[1] and "host by lru" in rows[1]
    assert "identity differs in dtype" in rows[2]
    assert [c.path for c in world.calls if "misses" in c.path] == ["/v1/misses/cmpl-1/2%3F"]
    board.fill("#request-id", "unknown")
    board.click("#misses-form [type=submit]")
    board.until_text("#misses-form .error", "unknown is not known.")
    assert board.text("#misses-result") == ""
