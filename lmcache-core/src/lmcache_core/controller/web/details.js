// One instance or one job in full, kept up to date while its dialog is open.

import { saying } from "./api.js";
import { Table, byId, el, put, setText } from "./dom.js";
import { bytes, duration, exact, exactBytes, listed, stamp } from "./format.js";
import { progressCell, showProgress, troubles } from "./jobs.js";

export class Details {
  constructor(client) {
    this.client = client;
    this.dialog = byId("details");
    this.body = byId("details-body");
    this.open_ = null;
    this.dialog.addEventListener("close", () => {
      this.open_ = null;
      this.body.replaceChildren();
    });
  }

  /** `path` of the API; `build(host)` makes what shows its answer. */
  async open(title, path, build) {
    setText(byId("details-title"), title);
    const error = el("p", { class: "error", role: "alert" });
    const host = el("div");
    this.body.replaceChildren(error, host);
    this.open_ = { path, show: build(host), error, busy: false };
    this.dialog.showModal();
    byId("details-title").focus();
    await this.refresh();
  }

  async refresh() {
    const open = this.open_;
    if (!open || open.busy) return;
    open.busy = true;
    try {
      const value = await this.client().get(open.path);
      if (this.open_ === open) open.show(value);
      setText(open.error, "");
    } catch (problem) {
      setText(open.error, saying(problem));
    } finally {
      open.busy = false;
    }
  }

  instance(instance) {
    return this.open(
      `Instance ${instance.name}`,
      `instances/${encodeURIComponent(instance.name)}`,
      buildInstance,
    );
  }

  job(job) {
    return this.open(`${job.kind} ${job.id}`, `jobs/${encodeURIComponent(job.id)}`, buildJob);
  }
}

/** A list of facts; the returned function shows values in their order. */
function facts(host, names) {
  const values = names.map(() => el("dd", { class: "num" }));
  host.append(
    el("dl", { class: "facts" }, ...names.flatMap((text, i) => [el("dt", { text }), values[i]])),
  );
  return (...texts) => texts.forEach((text, i) => put(values[i], ...[text].flat()));
}

function buildInstance(host) {
  const say = facts(host, [
    "State",
    "Kind",
    "Version",
    "Backends",
    "Process",
    "Up for",
    "Last seen",
    "Models",
    "Channel",
    "Node server",
    "Engines",
  ]);
  const tiers = el("div");
  const errors = el("div");
  host.append(el("h3", { text: "Tiers" }), tiers, el("h3", { text: "Errors since start" }), errors);
  const tierTable = new Table(tiers, {
    label: "Tiers",
    key: (t) => t.name,
    empty: "It has no tiers of its own.",
    columns: [
      { head: "Tier", class: "name", show: (c, t) => setText(c, t.name) },
      { head: "URL", class: "wrap mono", show: (c, t) => setText(c, t.url || "–") },
      {
        head: "Used",
        class: "num",
        show: (c, t) => put(c, bytes(t.used_bytes), exactBytes(t.used_bytes)),
      },
      {
        head: "Capacity",
        class: "num",
        show: (c, t) =>
          put(
            c,
            t.capacity_bytes ? bytes(t.capacity_bytes) : "no limit",
            exactBytes(t.capacity_bytes),
          ),
      },
      {
        head: "Pinned",
        class: "num",
        show: (c, t) => put(c, bytes(t.pinned_bytes), exactBytes(t.pinned_bytes)),
      },
      { head: "Chunks", class: "num", show: (c, t) => setText(c, exact(t.chunks)) },
      {
        head: "State",
        class: "wrap",
        show: (c, t) =>
          setText(c, t.available ? (t.writable ? "ok" : "read only") : `breaker open: ${t.reason}`),
      },
    ],
  });
  const errorTable = new Table(errors, {
    label: "Errors",
    key: ([name]) => name,
    empty: "None.",
    columns: [
      { head: "What", class: "name wrap", show: (c, [name]) => setText(c, name) },
      { head: "Count", class: "num", show: (c, [, n]) => setText(c, exact(n)) },
    ],
  });
  return (i) => {
    const backends = Object.entries(i.backends).map(([name, version]) => `${name} ${version}`);
    say(
      i.state,
      i.kind,
      i.version,
      backends.join(", ") || "–",
      `${i.pid}, ${i.incarnation}`,
      [duration(i.uptime_s), `${i.uptime_s} s`],
      stamp(i.seen_s),
      i.models.join(", ") || "–",
      i.channel || "–",
      i.node || "–",
      [listed(i.workers, 12) || "–", i.workers.join(", ")],
    );
    tierTable.show(i.tiers);
    errorTable.show(Object.entries(i.errors).slice(0, 200));
  };
}

function buildJob(host) {
  const say = facts(host, ["State", "Chunks", "Bytes", "Started", "Ended", "Pin", "Errors"]);
  const parts = el("div");
  host.append(el("h3", { text: "Parts" }), parts);
  const table = new Table(parts, {
    label: "Parts",
    key: (p) => p.number,
    empty: "It has no parts.",
    columns: [
      { head: "No.", class: "num name", show: (c, p) => setText(c, p.number) },
      { head: "Instance", show: (c, p) => put(c, p.instance, p.instance) },
      { head: "Order", show: (c, p) => setText(c, p.op) },
      {
        head: "State",
        class: "wrap",
        show: (c, p) =>
          setText(
            c,
            p.state === "waiting" && p.after.length
              ? `waits for ${listed(p.after.map(String))}`
              : p.state,
          ),
      },
      {
        head: "Chunks",
        class: "fillcell",
        make: progressCell,
        show: (c, p, row) => showProgress(p, row, `part ${p.number}`),
      },
      { head: "Bytes", class: "num", show: (c, p) => put(c, bytes(p.bytes), exactBytes(p.bytes)) },
      {
        head: "Notes",
        class: "wrap",
        show: (c, p) =>
          setText(
            c,
            Object.entries(p.notes)
              .map(([name, n]) => `${name} ${exact(n)}`)
              .join("; ") || "–",
          ),
      },
      { head: "Errors", class: "wrap", show: (c, p) => setText(c, troubles(p) || "–") },
    ],
  });
  return (job) => {
    say(
      job.state,
      `${exact(job.settled)} of ${exact(job.total)}`,
      [bytes(job.bytes), exactBytes(job.bytes)],
      stamp(job.made_s),
      job.ended_s ? stamp(job.ended_s) : "not yet",
      job.pin || "–",
      troubles(job) || "none",
    );
    table.show(job.parts.slice(0, 500));
  };
}
