"""What an operator sees, by mouse, by keyboard, by screen reader, in the dark, on a phone."""

from __future__ import annotations

import re

import pytest
from browser import ROOT, Page
from canned import GIB, instance, job, tier
from pd_proxy_rig import until
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from stub import World

import lmcache_core.controller.messages as api

CONTRAST = """
const rgb = text => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const ground = node => {
  for (let n = node; n; n = n.parentElement) {
    const c = rgb(getComputedStyle(n).backgroundColor);
    if (c[3] === 1) return c;
  }
  return rgb(getComputedStyle(document.documentElement).backgroundColor);
};
const poor = new Set();
let seen = 0;
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim()) continue;
  if (!node.checkVisibility({visibilityProperty: true})) continue;
  const style = getComputedStyle(node);
  const [a, b] = [light(rgb(node.closest("svg") ? style.fill : style.color)), light(ground(node))];
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  seen += 1;
  if (ratio < 4.5) poor.add(`${ratio.toFixed(2)} ${walker.currentNode.data.trim().slice(0, 30)}`);
}
return [seen, [...poor]];
"""


def test_the_summary_says_what_the_fleet_does(board: Page, world: World) -> None:
    live = [i for i in world.instances if i.state == "live"]
    asked = sum(i.rates.requested_tokens for i in live)
    hit = sum(i.rates.hit_tokens for i in live) / asked
    assert board.text("#sum-hit") == f"{hit * 100:.0f} %"
    assert board.text("#sum-instances") == "5 / 7"
    assert board.text("#sum-chunks") == "1.20 M"
    assert board.one("#sum-chunks").get_attribute("title") == "1,204,331"
    assert board.one("#sum-asked").get_attribute("title").startswith(f"{asked:.0f}"[:5])


def test_tier_bars_show_used_pinned_and_breaker(board: Page, world: World) -> None:
    bars = {bar.get_attribute("aria-label"): bar for bar in board.all("#instances .bar")}

    def width(label: str, part: str) -> float:
        shown: float = board.js("""
            const [bar, part] = arguments;
            const inner = bar.querySelector("." + part);
            inner.style.transition = "none";
            return inner.getBoundingClientRect().width / bar.getBoundingClientRect().width;
        """, bars[label], part)  # fmt: skip
        return shown

    for found in world.instances:
        for held in found.tiers:
            label = f"{held.name} of {found.name}"
            share = held.used_bytes / held.capacity_bytes if held.capacity_bytes else 0
            pinned = held.pinned_bytes / held.capacity_bytes if held.capacity_bytes else 0
            assert width(label, "fill") == pytest.approx(share, abs=0.01), label
            assert width(label, "pinned") == pytest.approx(pinned, abs=0.01), label
            assert bars[label].get_attribute("aria-valuenow") == str(held.used_bytes)
    assert len(bars) == sum(len(i.tiers) for i in world.instances)
    said = bars["disk of llama-0"].get_attribute("aria-valuetext")
    assert said == "118 GiB of 200 GiB, 8.00 GiB of it pinned"
    broken = board.js("return arguments[0].closest('li').textContent", bars["remote of llama-2"])
    assert "breaker open: 3 timeouts in 10 s" in broken
    assert "840 GiB, no limit" in broken
    assert "breaker" not in board.js(
        "return arguments[0].closest('li').textContent", bars["host of llama-2"])  # fmt: skip


def test_attention_has_problems_breakers_and_errors(board: Page, world: World) -> None:
    assert [li.text for li in board.all("#problems li")] == world.problems
    assert "remote" in board.text("#breakers") and "3 timeouts in 10 s" in board.text("#breakers")
    errors = [re.sub(r"\s+", " ", row.text) for row in board.all("#errors tbody tr")]
    assert errors[0] == "llama-2 remote.get.timeout 41", "most first"
    assert len(errors) == 3
    world.problems, world.instances = [], [instance("llama-0")]
    board.refresh()
    assert board.text("#problems") == "None." and board.text("#status-text") == "Healthy"
    assert not board.all("#errors tbody tr") and not board.all("#breakers tbody tr")


def test_a_chart_can_be_read_by_mouse_keyboard_and_as_a_table(board: Page, world: World) -> None:
    plot = board.one(".chart .plot-box")
    title = board.one(".chart h3").text
    assert title == "Hit rate"
    ticks = [t.text for t in board.all(".chart:first-child .plot text")]
    assert {"0 %", "50 %", "100 %"} <= set(ticks)
    assert any(re.fullmatch(r"\d\d:\d\d", tick) for tick in ticks), "times"
    last = world.history.samples[-1]
    assert last.hit_rate is not None
    assert board.text(".chart .legend b") == f"{last.hit_rate * 100:.0f} %"

    board.js("arguments[0].scrollIntoView({block: 'center'})", plot)
    width = plot.size["width"]
    mouse = ActionChains(board.driver, duration=0)
    mouse.move_to_element_with_offset(plot, -width // 4, 0).perform()
    assert board.text(".chart .when").startswith("at ")
    assert board.one(".chart .cursor").get_attribute("visibility") == "visible"
    ActionChains(board.driver, duration=0).move_to_element(board.one("#time-title")).perform()
    assert not board.text(".chart .when").startswith("at ")

    board.js("arguments[0].focus()", plot)
    board.press(Keys.HOME, Keys.ARROW_RIGHT)
    assert plot.get_attribute("aria-valuenow") == "1"
    second = world.history.samples[1].hit_rate
    assert second is not None
    assert f"found {second * 100:.0f} %" in (plot.get_attribute("aria-valuetext") or "")
    board.press(Keys.END)
    assert plot.get_attribute("aria-valuenow") == plot.get_attribute("aria-valuemax")

    board.click(".chart summary")
    until(lambda: board.all(".chart:first-child tbody tr"))
    rows = board.all(".chart:first-child tbody tr")
    assert 10 <= len(rows) <= 20 and " %" in rows[0].text


def test_a_chart_has_a_gap_where_nothing_is_known(board: Page, world: World) -> None:
    path = board.one(".chart:first-child path.line0").get_attribute("d") or ""
    assert path.count("M") == 2, "an interval without requests has no hit rate"
    world.history = api.History(interval_s=10, samples=[])
    board.refresh()
    until(lambda: board.one(".chart .none").is_displayed())


def test_rows_stay_themselves_over_refreshes(board: Page, world: World) -> None:
    button = board.one("#instances tbody tr:nth-child(3) .do button")
    board.js("arguments[0].focus(); window.row = arguments[0].closest('tr')", button)
    world.instances = [instance("alpha", 9), *reversed(world.instances)]
    board.refresh()
    assert board.text("#instances .count") == "8"
    assert board.focused() == "Act on llama-2…", "the focus stays at its row, which has moved"
    assert board.js("return row.isConnected && row === document.activeElement.closest('tr')")
    world.instances = [i for i in world.instances if i.name != "llama-2"]
    board.refresh()
    assert board.focused() == "Instances", "a row that went hands the focus to its table"


def test_nothing_moves_on_a_refresh(board: Page, world: World) -> None:
    def unchanged() -> float:
        board.refresh()
        shift: float = board.js("return window.shifted")
        return shift

    settled = unchanged()
    world.step(0.05)
    world.instances = [
        instance(i.name, at + 3, kind=i.kind, tiers=i.tiers, state=i.state, errors=i.errors,
                 node=i.node, workers=i.workers) for at, i in enumerate(world.instances)
    ]  # fmt: skip
    for _ in range(3):
        assert unchanged() == pytest.approx(settled, abs=0.002)


def test_names_that_are_markup_stay_text(page: Page, world: World) -> None:
    bad = "<img src=x onerror=window.pwned=1>\u202e\"'><script>window.pwned=1</script>" + "x" * 300
    world.instances = [
        instance(bad, models=[bad], channel=bad, node=bad, errors={bad: 3, "__proto__": 1},
                 backends={bad: bad}, tiers=[tier(bad, 1, 2, ok=False, reason=bad)]),
    ]  # fmt: skip
    world.problems = [bad]
    world.jobs = [job(1, "copy", "failed", error=bad, instance=bad, errors={bad: 1})]
    world.pins = [api.Pin(id=bad, owner=bad, instances=[bad], tier=bad, model=bad, chunks=1,
                          made_s=0.0, until_s=1e300, job=bad)]  # fmt: skip
    world.prefixes = [api.Prefix(instance=bad, model=bad, tenant_id=bad, key=bad, chunks=1,
                                 saved_tokens=1, requests=1)]  # fmt: skip
    world.quotas = [api.Quota(id=bad, tenant_id=bad, tier=bad, bytes=1)]
    images = len(page.all("img"))
    page.sign_in()
    page.click("#instances .link")
    until(lambda: bad[:30] in page.text("#details-body"))
    page.press(Keys.ESCAPE)
    page.click("#jobs .link")
    until(lambda: bad[:30] in page.text("#details-body"))
    page.press(Keys.ESCAPE)
    page.click("#pins .do button")
    assert bad[:30] in page.text("#confirm-words")
    page.press(Keys.ESCAPE)
    for part in ("instances", "jobs", "pins", "prefixes", "attention"):
        assert "<img src=x" in page.text(f"#{part}"), part
    assert len(page.all("img")) == images and not page.all("td script, th script, li script")
    assert page.js("return window.pwned") is None
    page.emulate(width=360)
    assert page.js("return document.documentElement.scrollWidth") <= 360, "long names stay inside"


@pytest.mark.parametrize("dark", [False, True])
def test_everything_can_be_read(board: Page, world: World, dark: bool) -> None:
    board.emulate(dark=dark)
    ground = board.js("return getComputedStyle(document.documentElement).backgroundColor")
    levels = [int(n) for n in re.findall(r"\d+", ground)]
    assert (max(levels) < 60) if dark else (min(levels) > 200)
    seen, poor = board.js(CONTRAST)
    assert seen > 200 and poor == [], "below WCAG AA"
    board.press("n")
    assert board.js(CONTRAST)[1] == []
    board.fill("#kind", "clear")
    board.fill("#action-way", "all")
    board.click("#action-form [type=submit]")
    assert board.js(CONTRAST)[1] == []


def test_a_theme_that_was_chosen_stays(board: Page) -> None:
    dark = "return matchMedia('(prefers-color-scheme: dark)').matches"
    assert board.js(dark) is False
    ground = "return getComputedStyle(document.documentElement).backgroundColor"
    light = board.js(ground)
    board.press("t", "t")
    assert board.one("#theme").get_attribute("aria-label") == "Theme: dark"
    assert board.js(ground) != light
    board.driver.refresh()
    assert board.js(ground) != light
    board.click("#theme")
    assert board.js(ground) == light, "as the system says"


def test_everything_has_a_name(board: Page) -> None:
    board.cdp("Accessibility.enable")
    nodes = board.cdp("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "link", "textbox", "searchbox", "combobox", "checkbox", "slider", "meter",
             "table", "region", "progressbar", "dialog", "spinbutton"}  # fmt: skip
    seen = [n for n in nodes if n.get("role", {}).get("value") in roles and not n["ignored"]]
    assert len(seen) > 60
    nameless = [n["role"]["value"] for n in seen if not n.get("name", {}).get("value")]
    assert nameless == []


def test_a_phone_shows_everything(board: Page) -> None:
    board.emulate(width=360, height=760)
    assert board.js("return document.documentElement.scrollWidth") <= 360
    over = board.js("""
        return [...document.querySelectorAll("#board section, #board section > *")]
          .filter(n => n.checkVisibility() && n.getBoundingClientRect().right > 361)
          .map(n => n.id || n.className);
    """)
    assert over == []
    board.press("n")
    box = board.one("#action").rect
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    board.click("#action-form [type=submit]")
    assert "prompt" in board.text("#action-form .error")


def test_instances_can_be_filtered_and_opened(board: Page) -> None:
    board.press("/")
    board.press(*"qwen resync")
    assert [row.text for row in board.all("#instances tbody .link")] == ["qwen-1"]
    assert board.text("#instances .count") == "1 of 7"
    board.fill("#filter", "node-a")
    board.press(Keys.END, " ")
    board.click("#instances tbody .link")
    board.until_text("#details-body", "qwen-0 and qwen-1", "redis://cache:6379", "read only",
                     "lmcache-backend-redis 0.9.0")  # fmt: skip
    board.press(Keys.ESCAPE)
    assert board.focused() == "node-a", "the focus goes back to what opened the dialog"


def test_usage_is_summed_and_set_against_quotas(board: Page, world: World) -> None:
    rows = {tuple(c.text for c in row.find_elements("css selector", "th, td")[:3]): row
            for row in board.all("#usage .table tbody tr")}  # fmt: skip
    assert len(rows) == 12
    limited = rows[("meta-llama/Llama-3.1-8B-Instruct", "3f2a9c01d4e5b678", "host")]
    # It takes most at node-a, of another model: 4.5 GiB * 0.73 * 1.08, of 4 GiB.
    assert "89 % of 4.00 GiB" in limited.text
    bar = limited.find_element("css selector", ".bar")
    assert bar.get_attribute("aria-valuenow") == str(int(4.5 * GIB * 0.73 * 1.08))
    assert "none" in rows[("meta-llama/Llama-3.1-8B-Instruct", "no salt", "host")].text


def test_pictures(board: Page) -> None:
    """Written to be looked at; the one of the docs is small enough."""
    for dark in (False, True):
        board.emulate(dark=dark, width=1440, height=1000)
        board.js("scrollTo(0, 0)")
        taken = board.shot("dark" if dark else "light")
        assert taken.stat().st_size > 30_000
    board.emulate(width=360, height=760)
    board.shot("narrow")
    docs = ROOT / "docs" / "images" / "controller.png"
    assert 10_000 < docs.stat().st_size < 300_000
