// Jobs: the table, those that were started from here, and their ends said aloud.

import { Table, bar, el, put, setAttr, setBar, setText } from "./dom.js";
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
  short,
  stamp,
} from "./format.js";

const MOST_FOLLOWED = 50;
const MOST_ASKED = 5;

const share = (job) => (job.total ? job.settled / job.total : job.state === "done" ? 1 : 0);
const total = (errors) => Object.values(errors).reduce((a, b) => a + b, 0);

export function progressCell(cell, row) {
  row.bar = bar();
  setAttr(row.bar.node, "role", "progressbar");
  row.text = el("span", { class: "num" });
  cell.append(row.bar.node, row.text);
}

export function showProgress(job, row, label) {
  const text = job.total
    ? `${count(job.settled)} / ${count(job.total)}`
    : job.state === "running"
      ? "starting"
      : job.settled
        ? count(job.settled)
        : "–";
  put(row.text, text, `${exact(job.settled)} of ${exact(job.total)} chunks`);
  setAttr(row.bar.node, "data-state", job.state);
  setBar(row.bar, [share(job)], {
    label,
    now: job.settled,
    max: Math.max(job.total, job.settled, 1),
    text: `${percent(share(job))}, ${job.state}`,
  });
}

/** Why it went wrong, in one line. */
export function troubles({ error, errors }) {
  const reasons = Object.entries(errors).map(([reason, n]) => `${reason} × ${exact(n)}`);
  return [error, ...reasons].filter(Boolean).join("; ");
}

function columns(act, now_s) {
  return [
    {
      head: "Job",
      class: "name",
      make(cell, row) {
        row.open = el("button", {
          class: "link",
          type: "button",
          on: { click: () => act.details(row.item) },
        });
        cell.append(row.open);
      },
      show(cell, job, row) {
        put(row.open, `${job.kind} ${short(job.id, 8)}`, job.id);
        setAttr(row.node, "data-job", job.id);
      },
    },
    {
      head: "State",
      make(cell, row) {
        row.state = el("span", { class: "state" });
        cell.append(row.state);
      },
      show(cell, job, row) {
        setText(row.state, job.state);
        setAttr(row.state, "data-state", job.state);
      },
    },
    {
      head: "Chunks",
      class: "fillcell",
      make: progressCell,
      show: (cell, job, row) => showProgress(job, row, `${job.kind} job ${short(job.id, 8)}`),
    },
    {
      head: "Bytes",
      class: "num",
      show: (cell, job) => put(cell, job.bytes ? bytes(job.bytes) : "–", exactBytes(job.bytes)),
    },
    {
      head: "Instances",
      class: "clip",
      show(cell, job) {
        const names = [...new Set(job.parts.map((part) => part.instance))];
        put(cell, listed(names, 3) || "–", names.join(", ") || null);
      },
    },
    {
      head: "Started",
      class: "num",
      show: (cell, job) => put(cell, ago(job.made_s, now_s()), stamp(job.made_s)),
    },
    {
      head: "Took",
      class: "num",
      show: (cell, job) =>
        put(
          cell,
          duration((job.ended_s ?? now_s()) - job.made_s),
          job.ended_s ? `ended ${stamp(job.ended_s)}` : "until now",
        ),
    },
    {
      head: "Errors",
      class: "clip",
      show(cell, job) {
        const text = troubles(job);
        put(cell, text || "–", text || null);
        cell.classList.toggle("bad", text !== "");
      },
    },
    {
      head: "",
      class: "do",
      make(cell, row) {
        row.cancel = el("button", {
          type: "button",
          text: "Cancel…",
          on: { click: () => act.cancel(row.item) },
        });
        cell.append(row.cancel);
      },
      show(cell, job, row) {
        setAttr(row.cancel, "aria-label", `Cancel ${job.kind} job ${short(job.id, 8)}…`);
        // Not `hidden` while it has the focus: the focus would be lost.
        const over = job.state !== "running";
        setAttr(row.cancel, "aria-disabled", over ? "true" : null);
        row.cancel.classList.toggle("gone", over);
        setAttr(row.cancel, "tabindex", over && document.activeElement !== row.cancel ? -1 : null);
      },
    },
  ];
}

/** The end of a job in a sentence. */
function ending(job) {
  const wrong = total(job.errors);
  const did = `${plural(job.settled, "chunk")}${job.bytes ? `, ${bytes(job.bytes)}` : ""}`;
  const errors = wrong ? `; ${plural(wrong, "error")}` : "";
  const why = job.error ? ` ${job.error}` : "";
  return `${job.kind} ${short(job.id, 8)} ${job.state}: ${did}${errors}.${why}`;
}

export class JobsView {
  /** `act`: `details(job)`, `cancel(job)`, `say(text)`, `load(id)` -> a job. */
  constructor(section, act, now_s) {
    this.needs = ["jobs"];
    this.act = act;
    this.counter = section.querySelector(".count");
    this.table = new Table(section.querySelector(".table"), {
      label: "Jobs",
      key: (job) => job.id,
      empty: "No jobs.",
      class: "jobs",
      columns: columns(act, now_s),
    });
    this.followed = new Map();
    this.listed = new Map();
  }

  /** Show `job` at once, and say when it ends. */
  follow(job) {
    this.followed.set(job.id, job);
    while (this.followed.size > MOST_FOLLOWED)
      this.followed.delete(this.followed.keys().next().value);
    this.#render();
  }

  show({ jobs }) {
    this.listed = new Map(jobs.jobs.map((job) => [job.id, job]));
    let asked = 0;
    for (const id of this.followed.keys()) {
      const job = this.listed.get(id);
      if (job) this.#note(job);
      else if (asked++ < MOST_ASKED) this.#ask(id);
    }
    this.#render();
  }

  async #ask(id) {
    const job = await this.act.load(id).catch(() => null); // The next round asks again.
    if (job && this.followed.has(id)) this.#note(job);
  }

  #note(job) {
    if (job.state === "running") return void this.followed.set(job.id, job);
    this.followed.delete(job.id);
    this.act.say(ending(job));
  }

  #render() {
    const all = [...this.listed.values()];
    const early = [...this.followed.values()].filter((job) => !this.listed.has(job.id));
    this.table.show([...early, ...all].sort((a, b) => b.made_s - a.made_s));
    const running = all.filter((job) => job.state === "running").length;
    setText(this.counter, `${exact(all.length)}, ${exact(running)} running`);
  }

  /** Bring the row of job `id` into view and give it the focus. */
  reveal(id) {
    const row = this.table.rows.rows.get(id);
    if (!row) return;
    row.node.scrollIntoView({ block: "center" });
    row.open.focus({ preventScroll: true });
  }
}
