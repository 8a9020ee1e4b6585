// What is seen of the fleet: summary, instances with their tiers, what wants attention, history.

import { Chart } from "./charts.js";
import { Rows, Table, bar, byId, el, put, setAttr, setBar, setText } from "./dom.js";
import {
  ago,
  bytes,
  count,
  duration,
  exact,
  exactBytes,
  listed,
  percent,
  plural,
  rate,
  stamp,
} from "./format.js";

const MOST_ERRORS = 50;
const MOST_PROBLEMS = 100;
const RATES = ["requested_tokens", "hit_tokens", "stored_tokens", "read_bytes", "write_bytes"];

const hitRate = (rates) =>
  rates.requested_tokens > 0 ? rates.hit_tokens / rates.requested_tokens : null;
const perSecond = (value) => `${rate(value)}/s`;
const bytesPerSecond = (value) => `${bytes(value)}/s`;

/** Numbers of the whole fleet in the last minute. */
export function summary(host) {
  const tile = (label, id) => {
    const value = el("dd", { class: "num", id });
    host.append(el("div", {}, el("dt", { text: label }), value));
    return value;
  };
  const tiles = {
    hit: tile("Hit rate", "sum-hit"),
    asked: tile("Tokens asked", "sum-asked"),
    found: tile("Tokens found", "sum-found"),
    stored: tile("Tokens stored", "sum-stored"),
    read: tile("Tier reads", "sum-read"),
    write: tile("Tier writes", "sum-write"),
    instances: tile("Instances live", "sum-instances"),
    chunks: tile("Chunks", "sum-chunks"),
  };
  const tokens = (node, value) => put(node, perSecond(value), `${value} tokens/s, last minute`);
  const load = (node, value) => put(node, bytesPerSecond(value), `${value} bytes/s, last minute`);
  return {
    needs: ["instances", "health"],
    show({ instances, health }) {
      const all = instances.instances;
      const live = all.filter((i) => i.state === "live");
      const sum = Object.fromEntries(
        RATES.map((r) => [r, live.reduce((n, i) => n + i.rates[r], 0)]),
      );
      const hit = hitRate(sum);
      put(tiles.hit, percent(hit), hit === null ? "nothing was asked" : `${hit}`);
      tokens(tiles.asked, sum.requested_tokens);
      tokens(tiles.found, sum.hit_tokens);
      tokens(tiles.stored, sum.stored_tokens);
      load(tiles.read, sum.read_bytes);
      load(tiles.write, sum.write_bytes);
      put(tiles.instances, `${exact(live.length)} / ${exact(all.length)}`);
      put(tiles.chunks, count(health.chunks), exact(health.chunks));
    },
  };
}

/** Charts, and which part of the history they show. */
export function overTime(host, range) {
  const charts = [
    new Chart(host, {
      title: "Hit rate",
      unit: "share of tokens asked",
      top: 1,
      say: percent,
      lines: [{ field: "hit_rate", label: "found" }],
    }),
    new Chart(host, {
      title: "Tokens",
      unit: "tokens/s",
      say: perSecond,
      lines: [
        { field: "requested_tokens", label: "asked" },
        { field: "hit_tokens", label: "found" },
        { field: "stored_tokens", label: "stored" },
      ],
    }),
    new Chart(host, {
      title: "Tiers below host",
      unit: "bytes/s",
      say: bytesPerSecond,
      binary: true,
      lines: [
        { field: "read_bytes", label: "read" },
        { field: "write_bytes", label: "written" },
      ],
    }),
  ];
  let latest = null;
  const show = ({ history }) => {
    latest = history;
    const all = history.samples;
    const from_s = Number(range.value) ? (all.at(-1)?.at_s ?? 0) - Number(range.value) : -Infinity;
    const samples = all.filter((s) => s.at_s >= from_s);
    for (const chart of charts) chart.show(samples, history.interval_s);
  };
  range.addEventListener("change", () => latest && show({ history: latest }));
  return { needs: ["history"], show };
}

function tierRow(list) {
  const row = {
    bar: bar(["fill", "pinned"]),
    name: el("span", { class: "tier-name" }),
    size: el("span", { class: "num tier-size" }),
    share: el("span", { class: "num tier-share" }),
    breaker: el("span", { class: "breaker" }),
  };
  row.node = el("li", {}, row.name, row.bar.node, row.size, row.share, row.breaker);
  list.append(row.node);
  return row;
}

function showTier(row, tier, instance) {
  const limit = tier.capacity_bytes;
  const share = limit ? tier.used_bytes / limit : null;
  put(row.name, tier.name, tier.url || null);
  put(
    row.size,
    limit ? `${bytes(tier.used_bytes)} of ${bytes(limit)}` : `${bytes(tier.used_bytes)}, no limit`,
    `${exactBytes(tier.used_bytes)}, ${limit ? `of ${exact(limit)}` : "no limit of ours"}, ` +
      `${exact(tier.chunks)} chunks`,
  );
  setText(row.share, share === null ? "" : percent(share));
  const pinned = tier.pinned_bytes ? `, ${bytes(tier.pinned_bytes)} of it pinned` : "";
  const of = limit ? `of ${bytes(limit)}` : "used, no limit";
  setBar(row.bar, [share ?? 0, limit ? tier.pinned_bytes / limit : 0], {
    label: `${tier.name} of ${instance.name}`,
    now: tier.used_bytes,
    max: limit || tier.used_bytes || 1,
    text: `${bytes(tier.used_bytes)} ${of}${pinned}`,
  });
  row.node.classList.toggle("open", !tier.available);
  const state = [
    tier.available ? "" : `breaker open${tier.reason ? `: ${tier.reason}` : ""}`,
    tier.writable ? "" : "read only",
  ]
    .filter(Boolean)
    .join(" · ");
  put(row.breaker, state, state || null);
  row.breaker.hidden = state === "";
}

const STATES = { live: "live", lost: "lost", resyncing: "resyncing" };

function instanceColumns(act, now_s) {
  const number = (head, pick, say, title) => ({
    head,
    class: "num",
    show: (cell, i) =>
      put(
        cell,
        i.kind === "node" && !i.workers.length && pick(i) === null ? "–" : say(pick(i)),
        title(pick(i)),
      ),
  });
  return [
    {
      head: "Instance",
      class: "name",
      make(cell, row) {
        row.state = el("span", { class: "state" });
        row.open = el("button", {
          class: "link",
          type: "button",
          on: { click: () => act.details(row.item) },
        });
        row.sub = el("span", { class: "muted sub" });
        cell.append(el("span", { class: "top" }, row.open, row.state), row.sub);
      },
      show(cell, i, row) {
        put(row.open, i.name, `Details of ${i.name}`);
        setText(row.state, STATES[i.state] ?? i.state);
        setAttr(row.state, "data-state", i.state);
        const where = i.node
          ? `at ${i.node}`
          : i.workers.length
            ? plural(i.workers.length, "engine")
            : "";
        put(
          row.sub,
          [i.kind, listed(i.models, 2), where].filter(Boolean).join(" · "),
          i.models.join(", "),
        );
      },
    },
    {
      head: "Tiers",
      class: "tiers",
      make(cell, row) {
        const list = el("ul", { class: "plain" });
        row.none = el("span", { class: "muted" });
        row.tiers = new Rows(list, {
          key: (t) => t.name,
          make: () => tierRow(list),
          update: (r, tier) => showTier(r, tier, row.item),
        });
        cell.append(list, row.none);
      },
      show(cell, i, row) {
        row.tiers.show(i.tiers);
        setText(
          row.none,
          i.tiers.length ? "" : i.node ? `in node server ${i.node}` : "none told yet",
        );
      },
    },
    number(
      "Hit rate",
      (i) => hitRate(i.rates),
      percent,
      (v) => (v === null ? "nothing was asked" : `${v}`),
    ),
    number(
      "Asked",
      (i) => i.rates.requested_tokens,
      perSecond,
      (v) => `${v} tokens/s`,
    ),
    number(
      "Stored",
      (i) => i.rates.stored_tokens,
      perSecond,
      (v) => `${v} tokens/s`,
    ),
    number(
      "Reads",
      (i) => i.rates.read_bytes,
      bytesPerSecond,
      (v) => `${v} bytes/s`,
    ),
    number(
      "Writes",
      (i) => i.rates.write_bytes,
      bytesPerSecond,
      (v) => `${v} bytes/s`,
    ),
    {
      head: "Seen",
      class: "num",
      show: (cell, i) =>
        put(cell, ago(i.seen_s, now_s()), `${stamp(i.seen_s)}; up for ${duration(i.uptime_s)}`),
    },
    {
      head: "",
      class: "do",
      make(cell, row) {
        row.act = el("button", {
          type: "button",
          text: "Act…",
          on: { click: () => act.on(row.item) },
        });
        cell.append(row.act);
      },
      show: (cell, i, row) => {
        setAttr(row.act, "aria-label", `Act on ${i.name}…`);
        row.act.hidden = i.tiers.length === 0;
      },
    },
  ];
}

/** The table of instances; `act.details(instance)`, `act.on(instance)`. */
export function instancesView(section, filter, act, now_s) {
  const table = new Table(section.querySelector(".table"), {
    label: "Instances",
    class: "instances",
    key: (i) => i.name,
    empty: "No instance to show.",
    columns: instanceColumns(act, now_s),
  });
  let latest = null;
  const show = ({ instances }) => {
    latest = instances;
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const all = instances.instances;
    const shown = all.filter((i) => {
      const text = [i.name, i.kind, i.state, i.node, ...i.models].join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    table.show(shown);
    setText(
      section.querySelector(".count"),
      shown.length === all.length
        ? exact(all.length)
        : `${exact(shown.length)} of ${exact(all.length)}`,
    );
  };
  filter.addEventListener("input", () => latest && show({ instances: latest }));
  return { needs: ["instances"], show };
}

/** Problems, open breakers and errors. */
export function attention() {
  const problems = new Rows(byId("problems"), {
    key: (p) => p,
    make: () => ({ node: el("li") }),
    update: (row, p) => setText(row.node, p),
    refuge: byId("attention"),
  });
  const name = (head, pick) => ({ head, show: (cell, item) => put(cell, pick(item), pick(item)) });
  const breakers = new Table(byId("breakers"), {
    label: "Open breakers",
    key: (b) => `${b.instance} ${b.tier}`,
    empty: "None.",
    class: "dense",
    cards: false,
    columns: [
      name("Instance", (b) => b.instance),
      name("Tier", (b) => b.tier),
      { ...name("Why", (b) => b.reason || "–"), class: "wrap" },
    ],
  });
  const errors = new Table(byId("errors"), {
    label: "Errors since start",
    key: (e) => `${e.instance} ${e.what}`,
    empty: "None.",
    class: "dense",
    cards: false,
    columns: [
      name("Instance", (e) => e.instance),
      { ...name("What", (e) => e.what), class: "wrap" },
      { head: "Count", class: "num", show: (cell, e) => put(cell, count(e.n), exact(e.n)) },
    ],
  });
  return {
    needs: ["health", "instances"],
    show({ health, instances }) {
      const all = instances.instances;
      problems.show(health.problems.length ? health.problems.slice(0, MOST_PROBLEMS) : ["None."]);
      breakers.show(
        all
          .flatMap((i) =>
            i.tiers
              .filter((t) => !t.available)
              .map((t) => ({ instance: i.name, tier: t.name, reason: t.reason })),
          )
          .slice(0, MOST_PROBLEMS),
      );
      errors.show(
        all
          .flatMap((i) =>
            Object.entries(i.errors)
              .filter(([, n]) => n > 0)
              .map(([what, n]) => ({ instance: i.name, what, n })),
          )
          .sort((a, b) => b.n - a.n)
          .slice(0, MOST_ERRORS),
      );
    },
  };
}
