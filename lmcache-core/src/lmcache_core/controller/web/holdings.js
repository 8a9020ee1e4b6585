// Who takes what, and what is kept: usage with quotas, pins, top prefixes.

import { Table, bar, byId, el, put, setAttr, setBar, setText } from "./dom.js";
import {
  bytes,
  count,
  duration,
  exact,
  exactBytes,
  listed,
  percent,
  short,
  stamp,
  tenantName,
} from "./format.js";

const MOST_ROWS = 200;

const mono = (head, pick, keep) => ({
  head,
  class: "mono",
  show: (cell, item) => put(cell, short(pick(item), keep), pick(item)),
});
const tenant = {
  head: "Tenant",
  class: "mono",
  show: (cell, item) =>
    put(cell, tenantName(item.tenant_id), item.tenant_id || "requests without a cache_salt"),
};
const model = {
  head: "Model",
  class: "name",
  show: (cell, item) => put(cell, item.model || "unknown", item.model || "its engine is gone"),
};
const number = (head, pick) => ({
  head,
  class: "num",
  show: (cell, item) => put(cell, count(pick(item)), exact(pick(item))),
});

function button(text, label, click) {
  return {
    head: "",
    class: "do",
    make(cell, row) {
      const press = () => click(row.item);
      (row.buttons ??= []).push(el("button", { type: "button", text, on: { click: press } }));
      cell.append(row.buttons.at(-1));
    },
    show: (cell, item) => setAttr(cell.firstChild, "aria-label", label(item)),
  };
}

/** Usage summed over instances, and where a tenant takes most of a tier. */
export function summed(usage) {
  const rows = new Map();
  const fullest = new Map();
  for (const u of usage) {
    const key = JSON.stringify([u.model, u.tenant_id, u.tier]);
    const row = rows.get(key) ?? {
      key,
      model: u.model,
      tenant_id: u.tenant_id,
      tier: u.tier,
      chunks: 0,
      bytes: 0,
      instances: new Set(),
    };
    row.chunks += u.chunks;
    row.bytes += u.bytes;
    row.instances.add(u.instance);
    rows.set(key, row);
    const at = JSON.stringify([u.tenant_id, u.tier, u.instance]);
    const full = fullest.get(at) ?? {
      tenant_id: u.tenant_id,
      tier: u.tier,
      instance: u.instance,
      bytes: 0,
    };
    full.bytes += u.bytes;
    fullest.set(at, full);
  }
  return {
    rows: [...rows.values()].sort((a, b) => b.bytes - a.bytes),
    fullest: [...fullest.values()],
  };
}

/** The instance where a quota is nearest to its end. */
function nearest(quota, fullest) {
  return fullest
    .filter((f) => f.tenant_id === quota.tenant_id && (quota.tier === "*" || f.tier === quota.tier))
    .reduce((most, f) => (most === null || f.bytes > most.bytes ? f : most), null);
}

function quotaBar(head, of) {
  return {
    head,
    class: "fillcell",
    make(cell, row) {
      row.bar = bar();
      row.text = el("span", { class: "num" });
      cell.append(row.bar.node, row.text);
    },
    show(cell, item, row) {
      const { quota, full } = of(item);
      row.bar.node.hidden = quota === null;
      const used = full?.bytes ?? 0;
      const share = !quota?.bytes ? Math.min(used, 1) : used / quota.bytes;
      put(
        row.text,
        quota === null ? "none" : `${percent(share)} of ${bytes(quota.bytes)}`,
        quota === null ? "no quota" : exactBytes(quota.bytes),
      );
      if (quota === null) return;
      row.bar.node.classList.toggle("over", share > 1);
      setBar(row.bar, [share], {
        label: `quota of ${tenantName(item.tenant_id)} in ${item.tier}`,
        now: Math.min(used, quota.bytes),
        max: quota.bytes || 1,
        text: full ? `${percent(share)} at ${full.instance}, where it takes most` : "takes nothing",
      });
    },
  };
}

export function usageView(section, act) {
  let quotas = [];
  let fullest = [];
  const quotaOf = (item) => {
    const mine = quotas.filter((q) => q.tenant_id === item.tenant_id);
    const quota =
      mine.find((q) => q.tier === item.tier) ?? mine.find((q) => q.tier === "*") ?? null;
    return { quota, full: quota && nearest({ ...quota, tier: item.tier }, fullest) };
  };
  const share = {
    head: "Bytes",
    class: "num",
    show: (cell, item) => put(cell, bytes(item.bytes), exactBytes(item.bytes)),
  };
  const where = {
    head: "Instances",
    class: "num",
    show: (cell, item) => put(cell, exact(item.instances.size), listed([...item.instances], 12)),
  };
  const table = new Table(section.querySelector(".table"), {
    label: "Usage",
    key: (u) => u.key,
    empty: "Nothing is stored.",
    columns: [
      model,
      { ...tenant, class: "mono long" },
      { head: "Tier", show: (cell, u) => setText(cell, u.tier) },
      where,
      number("Chunks", (u) => u.chunks),
      share,
      quotaBar("Quota, fullest instance", quotaOf),
      button(
        "Clear…",
        (u) => `Clear ${u.model} of ${tenantName(u.tenant_id)} in ${u.tier}…`,
        act.clear,
      ),
    ],
  });
  const limits = new Table(byId("quotas"), {
    label: "Quotas",
    key: (q) => q.id,
    empty: "No quotas.",
    columns: [
      { ...tenant, class: "mono name" },
      { head: "Tier", show: (cell, q) => setText(cell, q.tier === "*" ? "every tier" : q.tier) },
      quotaBar("Limit, fullest instance", (q) => ({ quota: q, full: nearest(q, fullest) })),
      button(
        "Change…",
        (q) => `Change the quota of ${tenantName(q.tenant_id)} in ${q.tier}…`,
        act.quota,
      ),
      button(
        "Remove…",
        (q) => `Remove the quota of ${tenantName(q.tenant_id)} in ${q.tier}…`,
        act.unlimit,
      ),
    ],
  });
  return {
    needs: ["usage", "quotas"],
    show({ usage, quotas: told }) {
      quotas = told.quotas;
      const sums = summed(usage.usage);
      fullest = sums.fullest;
      table.show(sums.rows.slice(0, MOST_ROWS));
      limits.show(quotas.slice(0, MOST_ROWS));
      const more = usage.truncated || sums.rows.length > MOST_ROWS;
      setText(
        section.querySelector(".count"),
        more ? "the largest; there are more" : exact(sums.rows.length),
      );
    },
  };
}

export function pinsView(section, act, now_s) {
  const table = new Table(section.querySelector(".table"), {
    label: "Pins",
    key: (p) => p.id,
    empty: "No pins.",
    columns: [
      { head: "Owner", class: "name", show: (cell, p) => put(cell, p.owner, p.id) },
      { head: "Model", class: "long", show: (cell, p) => put(cell, p.model, p.model) },
      { head: "Tier", show: (cell, p) => setText(cell, p.tier) },
      {
        head: "Instances",
        class: "long",
        show: (cell, p) => put(cell, listed(p.instances, 3), p.instances.join(", ")),
      },
      number("Chunks", (p) => p.chunks),
      {
        head: "Made",
        class: "num",
        show: (cell, p) => put(cell, stamp(p.made_s).slice(5, 16), stamp(p.made_s)),
      },
      {
        head: "Ends in",
        class: "num",
        show: (cell, p) =>
          put(
            cell,
            p.until_s > now_s() ? duration(p.until_s - now_s()) : "ended",
            stamp(p.until_s),
          ),
      },
      button("Unpin…", (p) => `Unpin ${p.id} of ${p.owner}…`, act.unpin),
    ],
  });
  return {
    needs: ["pins"],
    show({ pins }) {
      const soonest = [...pins.pins].sort((a, b) => a.until_s - b.until_s);
      table.show(soonest.slice(0, MOST_ROWS));
      setText(
        section.querySelector(".count"),
        soonest.length > MOST_ROWS
          ? `the ${MOST_ROWS} that end first of ${exact(soonest.length)}`
          : exact(soonest.length),
      );
    },
  };
}

export function prefixesView(section, act) {
  let most = 1;
  const table = new Table(section.querySelector(".table"), {
    label: "Top prefixes",
    empty: "No prefix has saved anything yet.",
    key: (p) => `${p.instance} ${p.key}`,
    columns: [
      { ...mono("First chunk", (p) => p.key, 16), class: "mono name" },
      { ...model, class: "long" },
      { ...tenant, class: "mono long" },
      { head: "Instance", show: (cell, p) => put(cell, p.instance, p.instance) },
      number("Longest hit, chunks", (p) => p.chunks),
      number("Requests", (p) => p.requests),
      {
        head: "Saved tokens",
        class: "fillcell",
        make(cell, row) {
          row.bar = bar();
          row.text = el("span", { class: "num" });
          cell.append(row.bar.node, row.text);
        },
        show(cell, p, row) {
          put(row.text, count(p.saved_tokens), exact(p.saved_tokens));
          setBar(row.bar, [p.saved_tokens / most], {
            label: `saved by ${short(p.key)}`,
            now: p.saved_tokens,
            max: most,
            text: `${exact(p.saved_tokens)} tokens`,
          });
        },
      },
      button("Look up", (p) => `Look up chunk ${short(p.key, 16)}`, act.lookup),
    ],
  });
  return {
    needs: ["prefixes"],
    show({ prefixes }) {
      most = Math.max(1, ...prefixes.prefixes.map((p) => p.saved_tokens));
      table.show(prefixes.prefixes.slice(0, MOST_ROWS));
    },
  };
}
