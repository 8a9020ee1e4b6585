// Who has a prompt, and why a request missed.

import { saying } from "./api.js";
import { Table, bar, byId, el, put, setBar, setText } from "./dom.js";
import { exact, percent, plural, short, stamp } from "./format.js";
import { Invalid, Selection } from "./selection.js";

const MOST_RUNS = 500;

const REASONS = {
  "": "found, or on the device",
  never_stored: "never stored",
  evicted: "evicted",
  deadline: "not there before the deadline",
  breaker: "its tier's breaker was open",
  corrupt: "was corrupt",
  not_needed: "after a gap, so of no use",
};

export function reasonInWords(reason) {
  if (reason.startsWith("identity."))
    return `identity differs in ${reason.slice("identity.".length)}`;
  return REASONS[reason] ?? reason;
}

/** Neighbouring chunks that missed for the same reason, as one run. */
export function runs(misses) {
  const out = [];
  for (const miss of misses) {
    const last = out.at(-1);
    if (
      last &&
      last.reason === miss.reason &&
      last.detail === miss.detail &&
      last.to + 1 === miss.index
    ) {
      last.to = miss.index;
      last.until_s = miss.at_s ?? last.until_s;
    } else {
      out.push({
        from: miss.index,
        to: miss.index,
        key: miss.key,
        reason: miss.reason,
        detail: miss.detail,
        at_s: miss.at_s,
        until_s: miss.at_s,
      });
    }
  }
  return out;
}

/** Have `ask()` fill `result` when `form` is sent; one at a time. */
function asking(form, result, ask) {
  const button = form.querySelector("[type=submit]");
  const error = form.querySelector(".error");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (button.getAttribute("aria-disabled") === "true") return;
    setText(error, "");
    button.setAttribute("aria-disabled", "true");
    try {
      result.replaceChildren(...(await ask()));
    } catch (problem) {
      result.replaceChildren();
      setText(error, problem instanceof Invalid ? problem.message : saying(problem));
      if (problem instanceof Invalid) problem.field.focus();
    } finally {
      button.removeAttribute("aria-disabled");
    }
  });
}

function holdings(reply) {
  const host = el("div");
  const whole = Math.max(1, reply.keys.length);
  const table = new Table(host, {
    label: "Holdings",
    key: (h) => h.instance,
    empty: "No instance has any of it.",
    columns: [
      { head: "Instance", class: "name", show: (cell, h) => put(cell, h.instance, h.instance) },
      {
        head: "Chunks",
        class: "fillcell",
        make(cell, row) {
          row.bar = bar();
          row.text = el("span", { class: "num" });
          cell.append(row.bar.node, row.text);
        },
        show(cell, h, row) {
          put(row.text, `${exact(h.chunks)} / ${exact(reply.keys.length)}`);
          setBar(row.bar, [h.chunks / whole], {
            label: `held by ${h.instance}`,
            now: h.chunks,
            max: whole,
            text: percent(h.chunks / whole),
          });
        },
      },
      { head: "Tokens", class: "num", show: (cell, h) => put(cell, exact(h.tokens)) },
      {
        head: "By tier",
        class: "wrap",
        show: (cell, h) =>
          setText(cell, h.tiers.map((t) => `${t.tier} ${exact(t.tokens)}`).join(" · ")),
      },
    ],
  });
  table.show(reply.instances);
  return host;
}

/** The lookup form; `act(kind, given)` opens an action on what was looked up. */
export class Lookup {
  constructor(client, act) {
    this.form = byId("lookup-form");
    this.selection = new Selection(this.form.querySelector(".selection"), "lookup", [
      "text",
      "tokens",
      "keys",
    ]);
    asking(this.form, byId("lookup-result"), async () => {
      const { select } = this.selection.read();
      const reply = await client().ask("POST", "lookup", { body: { select } });
      const asked = reply.prompt_tokens ? `${plural(reply.prompt_tokens, "token")}: ` : "";
      const kinds = select.keys ? ["copy", "move", "clear"] : ["pin", "copy", "move", "clear"];
      return [
        el(
          "p",
          {},
          `${asked}${plural(reply.chunks, "whole chunk")} of ${exact(reply.chunk_size)} tokens, `,
          "model ",
          el("b", { text: reply.model || "unknown" }),
        ),
        holdings(reply),
        el(
          "div",
          { class: "row" },
          ...kinds.map((kind) =>
            el("button", {
              type: "button",
              text: `${kind[0].toUpperCase()}${kind.slice(1)}…`,
              on: { click: () => act(kind, { select }) },
            }),
          ),
        ),
      ];
    });
  }

  /** Look a chunk's key up now. */
  key(key) {
    this.selection.fill({ keys: [key] });
    this.form.closest("section").scrollIntoView({ block: "start" });
    this.form.querySelector("[type=submit]").focus({ preventScroll: true });
    this.form.requestSubmit();
  }

  clear() {
    this.selection.clear();
    byId("lookup-result").replaceChildren();
  }
}

/** The form that explains a request's misses. */
export class Misses {
  constructor(client) {
    this.field = byId("request-id");
    asking(byId("misses-form"), byId("misses-result"), async () => {
      const id = this.field.value.trim();
      if (!id) throw new Invalid(this.field, "Give the request's id.");
      const reply = await client().get(`misses/${encodeURIComponent(id)}`);
      const all = runs(reply.misses);
      const host = el("div");
      const table = new Table(host, {
        label: "Chunks of the request",
        key: (run) => run.from,
        empty: "It had no whole chunk.",
        columns: [
          {
            head: "Chunks",
            class: "num name",
            show: (cell, r) =>
              put(
                cell,
                r.from === r.to ? exact(r.from) : `${exact(r.from)}–${exact(r.to)}`,
                `first key ${r.key}`,
              ),
          },
          {
            head: "Why",
            class: "wrap",
            show: (cell, r) => put(cell, reasonInWords(r.reason), r.reason),
          },
          { head: "Detail", class: "wrap", show: (cell, r) => setText(cell, r.detail || "–") },
          {
            head: "When",
            class: "num",
            show: (cell, r) =>
              put(
                cell,
                r.at_s ? stamp(r.at_s).slice(5) : "–",
                r.at_s ? `${stamp(r.at_s)} to ${stamp(r.until_s)}` : null,
              ),
          },
        ],
      });
      table.show(all.slice(0, MOST_RUNS));
      const missed = reply.misses.filter((m) => m.reason).length;
      const more = all.length > MOST_RUNS ? `; the first ${MOST_RUNS} runs` : "";
      return [
        el(
          "p",
          {},
          "Request ",
          el("b", { text: short(reply.request_id, 40) }),
          ` at ${reply.instance}: ${exact(
            missed,
          )} of ${plural(reply.misses.length, "chunk")} not found${more}.`,
        ),
        host,
      ];
    });
  }

  clear() {
    this.field.value = "";
    byId("misses-result").replaceChildren();
  }
}
