"""Debian's chromium, driven by selenium, and a page of the controller in it."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pd_proxy_rig import until
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

ROOT = Path(__file__).parents[3]
SHOTS = ROOT / "build" / "screenshots"
BEFORE_LOAD = """
window.violations = [];
window.complaints = [];
window.shifted = 0;
addEventListener("securitypolicyviolation",
  e => violations.push(e.violatedDirective + " " + e.blockedURI));
addEventListener("error", e => complaints.push(String(e.message)));
addEventListener("unhandledrejection", e => complaints.push(String(e.reason)));
new PerformanceObserver(list => list.getEntries().forEach(e => (window.shifted += e.value)))
  .observe({type: "layout-shift", buffered: true});
"""
CHOOSE = """
const [select, value] = arguments;
select.value = value;
select.dispatchEvent(new Event("change", {bubbles: true}));
"""
FOCUSED = """
const node = document.activeElement;
return node.id || node.getAttribute("aria-label") || node.textContent.trim();
"""


def missing() -> str:
    """Why no browser can be had, or ""."""
    programs = {"chromium": "chromium", "chromedriver": "chromium-driver"}
    absent = [package for program, package in programs.items() if shutil.which(program) is None]
    return f"no browser: apt-get install {' '.join(absent)}" if absent else ""


@contextlib.contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A headless browser that can reach this machine only; ended with its driver."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-extensions", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--window-size=1440,1000", "--force-device-scale-factor=1", "--no-proxy-server",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_script_timeout(20)
    try:
        yield driver
    finally:
        driver.quit()


@dataclass
class Page:
    """One tab with the page of the controller at ``url``.

    Attributes:
        expected: parts of console messages that a test provokes.
    """

    driver: webdriver.Chrome
    url: str
    token: str
    expected: list[str] = field(default_factory=list)

    def load(self) -> None:
        """Open the page, as a visitor does."""
        self.driver.get(self.url)
        until(lambda: self.all("main > :not([hidden])"), "no page")

    def sign_in(self) -> None:
        """Give the token, and wait for everything to be shown."""
        self.one("#token").send_keys(self.token, Keys.ENTER)
        self.filled()

    def filled(self) -> None:
        """Wait for the first round."""
        until(lambda: self.js("return document.body.classList.contains('filled')"), "no data")

    def js(self, script: str, *args: Any) -> Any:
        """What ``script`` returns."""
        return self.driver.execute_script(script, *args)

    def one(self, css: str) -> WebElement:
        """The first element of ``css``."""
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[WebElement]:
        """Every element of ``css``."""
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        """What ``css`` has as text, shown or not."""
        found: str = self.js("return document.querySelector(arguments[0])?.textContent ?? ''", css)
        return found

    def until_text(self, css: str, *parts: str) -> None:
        """Wait for each of ``parts`` in ``css``."""
        until(lambda: all(p in self.text(css) for p in parts), f"{css}: no {parts}")

    def fill(self, css: str, value: str) -> None:
        """Type ``value``, or choose it."""
        field_ = self.one(css)
        if field_.tag_name == "select":
            self.js(CHOOSE, field_, value)
            assert field_.get_attribute("value") == value, f"{css} has no {value}"
            return
        field_.clear()
        field_.send_keys(value)

    def click(self, css: str) -> None:
        """Press, in view."""
        found = self.one(css)
        self.js("arguments[0].scrollIntoView({block: 'center'})", found)
        found.click()

    def press(self, *keys: str) -> None:
        """Type ``keys`` at whatever has the focus."""
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def focused(self) -> str:
        """The id of what has the focus, or its text."""
        found: str = self.js(FOCUSED)
        return found

    def tab_to(self, wanted: str, most: int = 60) -> None:
        """Press Tab until the focus is at ``wanted``, as `focused` says it."""
        passed = []
        for _ in range(most):
            if self.focused() == wanted:
                return
            passed.append(self.focused())
            self.press(Keys.TAB)
        raise AssertionError(f"Tab does not reach {wanted}; it goes {passed}")

    def refresh(self) -> None:
        """Ask for everything now, and wait until it was shown."""
        self.driver.execute_async_script("""
            const done = arguments[0];
            const before = performance.getEntriesByType("resource").length;
            document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "r", bubbles: true}));
            const look = () => {
              const news = performance.getEntriesByType("resource").slice(before).map(e => e.name);
              if (["/v1/prefixes", "/v1/jobs"].every(p => news.some(n => n.includes(p)))) {
                performance.clearResourceTimings();
                return requestAnimationFrame(() => setTimeout(done, 30));
              }
              setTimeout(look, 10);
            };
            look();
        """)

    def emulate(self, *, dark: bool = False, width: int = 0, height: int = 900) -> None:
        """Another colour scheme, or another size of the screen (0: the window's)."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])
        if width:
            self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height,
                     deviceScaleFactor=1, mobile=width < 500)  # fmt: skip
        else:
            self.cdp("Emulation.clearDeviceMetricsOverride")

    def cdp(self, command: str, **params: Any) -> Any:
        """A command of the browser's own protocol."""
        return self.driver.execute_cdp_cmd(command, params)

    def shot(self, name: str, *, whole: bool = False) -> Path:
        """A picture in build/screenshots; ``whole``: also what is below the fold."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        path = SHOTS / f"{name}.png"
        taken = self.cdp("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        path.write_bytes(base64.b64decode(taken["data"]))
        return path

    def judge(self) -> None:
        """Nothing was complained about, blocked, or asked of another host."""
        assert self.js("return window.violations") == [], "the policy was violated"
        complaints = self.js("return window.complaints")
        assert complaints == [], f"the page complains: {complaints}"
        rows = [row["message"] for row in self.driver.get_log("browser")]
        wrong = [row for row in rows if not any(part in row for part in self.expected)]
        assert wrong == [], f"the console complains: {wrong}"
        hosts = {urlsplit(url).netloc for url in self.requested()}
        assert hosts <= {urlsplit(self.url).netloc}, "another host was asked"

    def requested(self) -> list[str]:
        """What this tab has asked for over the network since the last call."""
        urls = []
        for row in self.driver.get_log("performance"):
            message = json.loads(row["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                urls.append(message["params"]["request"]["url"])
        return [url for url in urls if url.startswith(("http:", "https:", "ws:", "wss:"))]


@contextlib.contextmanager
def opened(driver: webdriver.Chrome, url: str, token: str) -> Iterator[Page]:
    """A fresh tab; what it did is judged at the end."""
    page = Page(driver, url, token)
    page.emulate()
    added = page.cdp("Page.addScriptToEvaluateOnNewDocument", source=BEFORE_LOAD)
    driver.get_log("browser"), driver.get_log("performance")
    try:
        page.load()
        yield page
        page.judge()
    finally:
        page.cdp("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])
        driver.get("about:blank")
