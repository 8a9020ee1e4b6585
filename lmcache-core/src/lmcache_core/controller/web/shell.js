// What is around the parts: theme, shortcuts, dialogs, notices.

import { byId, el, setText } from "./dom.js";

const THEMES = ["system", "light", "dark"];
const MOST_TOASTS = 3;
const MOST_SAID = 20;
const TOAST_MS = 20_000;

/** Storage may be off; then a choice lasts as long as the page. */
export function stored(storage, name, value) {
  try {
    if (value === undefined) return window[storage].getItem(name);
    if (value === null) window[storage].removeItem(name);
    else window[storage].setItem(name, value);
  } catch {
    // As said above.
  }
  return null;
}

export class Themes {
  constructor(button) {
    this.button = button;
    this.at = Math.max(0, THEMES.indexOf(stored("localStorage", "lmcache-theme") ?? "system"));
    button.addEventListener("click", () => this.next());
    this.#show();
  }

  next() {
    this.at = (this.at + 1) % THEMES.length;
    stored("localStorage", "lmcache-theme", THEMES[this.at]);
    this.#show();
  }

  #show() {
    const theme = THEMES[this.at];
    setText(this.button.lastElementChild, theme);
    this.button.setAttribute("aria-label", `Theme: ${theme}`);
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  }
}

/** Say `text` to a screen reader. */
export function say(text) {
  const log = byId("live");
  log.append(el("p", { text }));
  while (log.childElementCount > MOST_SAID) log.firstChild.remove();
}

/** A notice at the edge of the page, and said; `go`: [label, function]. */
export function toast(text, go = null) {
  const host = byId("toasts");
  const close = () => {
    if (node.contains(document.activeElement)) byId("main").focus({ preventScroll: true });
    node.remove();
  };
  const node = el("div", { class: "toast" }, el("span", { text }));
  if (go)
    node.append(
      el("button", { type: "button", text: go[0], on: { click: () => (close(), go[1]()) } }),
    );
  const name = "Close notice";
  node.append(
    el("button", { type: "button", text: "×", "aria-label": name, on: { click: close } }),
  );
  host.append(node);
  while (host.childElementCount > MOST_TOASTS) host.firstChild.remove();
  setTimeout(() => !node.matches(":hover, :focus-within") && close(), TOAST_MS);
  say(text);
}

/** Every dialog closes by its own buttons and by a press beside it. */
export function dialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener(
      "click",
      (event) => event.target.closest("[data-close]") && dialog.close(),
    );
  }
}

/** Bring a part of the page into view and start there. */
export function visit(id) {
  byId(id).scrollIntoView({ block: "start" });
  byId(id).focus({ preventScroll: true });
}

const typing = (node) => node.closest("input, textarea, select, [contenteditable]") !== null;

/** `keys`: [key, what it does, function]; not while somebody types, or a dialog is open. */
export class Shortcuts {
  constructor(keys, ready) {
    this.keys = new Map(keys.map(([key, , act]) => [key, act]));
    const on = byId("shortcuts-on");
    on.checked = stored("localStorage", "lmcache-shortcuts") !== "off";
    on.addEventListener("change", () =>
      stored("localStorage", "lmcache-shortcuts", on.checked ? "on" : "off"),
    );
    byId("shortcuts").append(
      ...keys.flatMap(([key, what]) => [
        el("dt", {}, el("kbd", { text: key })),
        el("dd", { text: what }),
      ]),
    );
    document.addEventListener("keydown", (event) => {
      const act = this.keys.get(event.key);
      if (
        !act ||
        !on.checked ||
        event.ctrlKey ||
        event.altKey ||
        event.metaKey ||
        event.isComposing
      )
        return;
      if (typing(event.target) || document.querySelector("dialog[open]") || !ready()) return;
      event.preventDefault();
      act();
    });
  }
}
