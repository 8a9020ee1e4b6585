// The form of what an operator does with chunks, and actions of single rows.

import { checked } from "./confirm.js";
import { byId, el, options, setText } from "./dom.js";
import { bytes, plural, short } from "./format.js";
import { QuotaForm } from "./quota.js";
import { Invalid, Selection } from "./selection.js";
import { explain, explainCancel, explainUnlimit, explainUnpin } from "./words.js";

const MOST_TTL_S = 30 * 86_400;
const IDENT = /^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$/;
const PREFIXES = ["text", "tokens"];
const ALL_WAYS = ["text", "tokens", "keys", "group", "all"];

export class Actions {
  /** `store`: what was told last; `done(answer)` for what was taken. */
  constructor(confirmation, store, done) {
    Object.assign(this, { confirmation, store, done });
    this.dialog = byId("action");
    this.form = byId("action-form");
    this.f = this.form.elements;
    this.selection = new Selection(this.form.querySelector(".selection"), "action", ALL_WAYS);
    this.f.kind.addEventListener("change", () => this.#arrange());
    for (const end of ["source", "target"]) {
      this.f[`${end}_instance`].addEventListener("change", () => this.#tiersOf(end));
    }
    const add = byId("on-add");
    add.addEventListener("change", () => {
      const names = new Set([...this.#names(), add.value].filter(Boolean));
      this.f.on.value = [...names].join(", ");
      add.value = "";
    });
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    // A salt or a prompt does not wait here for whoever comes next.
    this.dialog.addEventListener("close", () => this.selection.clear());
    this.quota = new QuotaForm(this);
  }

  /** `given`: { select, instance }, when the action starts from a row. */
  open(kind, given = {}) {
    this.form.reset();
    setText(this.form.querySelector(".error"), "");
    this.f.kind.value = kind;
    this.#arrange();
    this.selection.clear();
    if (given.select) this.selection.fill(given.select);
    if (given.instance) {
      this.f.on.value = given.instance;
      this.f.source_instance.value = given.instance;
      this.#tiersOf("source");
    }
    for (const box of this.#tierBoxes()) box.checked = (given.tiers ?? []).includes(box.value);
    this.dialog.showModal();
    this.f.kind.focus();
  }

  unpin(pin) {
    this.confirmation.open(
      { method: "DELETE", path: `pins/${encodeURIComponent(pin.id)}` },
      explainUnpin(pin),
      this.done,
    );
  }

  cancel(job) {
    if (job.state !== "running") return;
    const path = `jobs/${encodeURIComponent(job.id)}/cancel`;
    this.confirmation.open({ method: "POST", path }, explainCancel(job), this.done);
  }

  unlimit(quota) {
    const path = `quotas/${encodeURIComponent(quota.id)}`;
    this.confirmation.open({ method: "DELETE", path }, explainUnlimit(quota), this.done);
  }

  instances() {
    return (this.store.values.instances?.instances ?? []).filter((i) => i.tiers.length);
  }

  tierNames() {
    return [...new Set(["host", ...this.instances().flatMap((i) => i.tiers.map((t) => t.name))])];
  }

  #tierBoxes() {
    return [...byId("tiers").querySelectorAll("input")];
  }

  #arrange() {
    const kind = this.f.kind.value;
    for (const part of this.form.querySelectorAll("[data-for]")) {
      part.hidden = !part.dataset.for.split(" ").includes(kind);
    }
    this.selection.offer(kind === "pin" ? PREFIXES : ALL_WAYS);
    const names = this.instances().map((i) => i.name);
    options(byId("on-add"), names, { first: "Add…" });
    options(this.f.source_instance, names);
    options(this.f.target_instance, names);
    options(this.f.tier, this.tierNames());
    const known = this.#tierBoxes().map((box) => box.value);
    if (known.join() !== this.tierNames().join()) {
      byId("tiers")
        .querySelector(".checks")
        .replaceChildren(
          ...this.tierNames().map((value) =>
            el("label", { class: "check" }, el("input", { type: "checkbox", value }), ` ${value}`),
          ),
        );
    }
    this.#tiersOf("source");
    this.#tiersOf("target");
    setText(
      byId("on-note"),
      kind === "pin" ? "(empty: those that have some of it)" : "(empty: every one)",
    );
  }

  #tiersOf(end) {
    const name = this.f[`${end}_instance`].value;
    const tiers = this.instances().find((i) => i.name === name)?.tiers ?? [];
    const closed = (t) => end === "target" && !t.writable;
    const label = (t) => `${t.name} · ${bytes(t.used_bytes)}${closed(t) ? " · read only" : ""}`;
    const labels = new Map(tiers.map((t) => [t.name, label(t)]));
    const disabled = new Set(tiers.filter(closed).map((t) => t.name));
    options(
      this.f[`${end}_tier`],
      tiers.map((t) => t.name),
      { labels, disabled },
    );
  }

  #names() {
    return this.f.on.value.split(/[\s,]+/).filter(Boolean);
  }

  #named() {
    const known = new Set(this.instances().map((i) => i.name));
    const names = [...new Set(this.#names())];
    const wrong = names.find((name) => !known.has(name));
    if (wrong)
      throw new Invalid(this.f.on, `No instance with a cache is named “${short(wrong, 40)}”.`);
    return names;
  }

  #place(end) {
    const [instance, tier] = [this.f[`${end}_instance`], this.f[`${end}_tier`]];
    if (!instance.value) throw new Invalid(instance, "There is no instance with a cache.");
    if (!tier.value) throw new Invalid(tier, `${instance.value} has no tier that can be used.`);
    return { instance: instance.value, tier: tier.value };
  }

  #body(kind, select) {
    const body = { select };
    if (kind === "copy" || kind === "move") {
      Object.assign(body, { source: this.#place("source"), target: this.#place("target") });
      if (body.source.instance === body.target.instance && body.source.tier === body.target.tier) {
        throw new Invalid(this.f.target_tier, "Source and target are the same place.");
      }
      return body;
    }
    const instances = this.#named();
    if (instances.length) body.instances = instances;
    if (kind === "clear") {
      const tiers = this.#tierBoxes()
        .filter((box) => box.checked)
        .map((box) => box.value);
      return tiers.length ? { ...body, tiers } : body;
    }
    body.tier = this.f.tier.value;
    if (kind === "pin") {
      body.owner = this.f.owner.value.trim();
      if (!IDENT.test(body.owner))
        throw new Invalid(this.f.owner, "Give an owner: letters, digits and . _ : - only.");
      body.ttl_s = Number(this.f.ttl.value) * Number(this.f.ttl_unit.value);
      if (!(body.ttl_s > 0 && body.ttl_s <= MOST_TTL_S))
        throw new Invalid(this.f.ttl, "A pin lasts more than 0 and at most 30 days.");
    }
    if (kind === "compress") {
      body.codec = this.f.codec.value.trim();
      if (!body.codec) throw new Invalid(this.f.codec, "Give a codec's name, such as zstd.");
      const level = this.f.level.value.trim();
      if (level) body.level = level;
    }
    return body;
  }

  #submit() {
    const kind = this.f.kind.value;
    const read = checked(this.form, () => {
      const { select, words } = this.selection.read();
      return { what: words, body: this.#body(kind, select) };
    });
    if (!read) return;
    const said = explain(kind, read.what, read.body, {
      usage: this.store.values.usage,
      now_s: this.store.now_s(),
    });
    this.confirmation.open(
      { method: "POST", path: kind === "pin" ? "pins" : kind, body: read.body },
      said,
      (answer) => {
        this.dialog.close();
        this.done(answer);
      },
      { back: "Back" },
    );
  }
}

/** What to tell when `answer` was taken: a job, a pin with its job, or a quota. */
export function taken(answer) {
  if (answer?.kind)
    return {
      id: answer.id,
      job: answer,
      text: `${answer.kind} ${short(answer.id, 8)}: ${answer.state}.`,
    };
  if (answer?.job)
    return {
      id: answer.job,
      job: null,
      text: `Pin ${short(answer.id, 8)}: ${plural(answer.chunks, "chunk")}.`,
    };
  if (answer?.bytes !== undefined)
    return { id: null, job: null, text: `Quota set: ${bytes(answer.bytes)}.` };
  return { id: null, job: null, text: "Done." };
}
