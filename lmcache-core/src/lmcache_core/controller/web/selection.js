// Which chunks are meant: the fields of the API's `Selection`, and what was chosen in words.

import { el, setText } from "./dom.js";
import { count, exact, plural, short } from "./format.js";

const MOST_TOKENS = 1 << 20;
const MOST_KEYS = 65_536;
const MOST_TEXT_BYTES = 4 << 20;
const PREFIX = new Set(["text", "tokens"]);
export const WAYS = {
  text: "prefix of a prompt text",
  tokens: "prefix of token ids",
  keys: "chunks by key",
  group: "everything of a model or tenant",
  all: "everything",
};
const TENANTS = {
  any: "any tenant",
  none: "without a salt",
  salt: "by cache_salt",
  id: "by tenant id",
};

/** Something in a form is missing or wrong; `field` gets the focus. */
export class Invalid extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

function parseTokens(field) {
  const words = field.value
    .replace(/^\s*\[|\]\s*$/g, "")
    .split(/[\s,]+/)
    .filter(Boolean);
  if (!words.length)
    throw new Invalid(field, "Give token ids: whole numbers, with spaces or commas between.");
  if (words.length > MOST_TOKENS)
    throw new Invalid(field, `At most ${exact(MOST_TOKENS)} token ids.`);
  return words.map((word) => {
    if (!/^\d{1,10}$/.test(word) || Number(word) >= 2 ** 32) {
      throw new Invalid(field, `“${short(word, 20)}” is no token id.`);
    }
    return Number(word);
  });
}

function parseKeys(field) {
  const words = field.value
    .split(/[\s,]+/)
    .filter(Boolean)
    .map((word) => word.toLowerCase());
  if (!words.length) throw new Invalid(field, "Give keys: 92 hex digits each.");
  if (words.length > MOST_KEYS) throw new Invalid(field, `At most ${exact(MOST_KEYS)} keys.`);
  const wrong = words.find((word) => !/^[0-9a-f]{92}$/.test(word));
  if (wrong) throw new Invalid(field, `“${short(wrong, 20)}”: a key has 92 hex digits.`);
  return words;
}

export class Selection {
  /** `name`: makes ids of the fields unique. `ways`: of `WAYS`. */
  constructor(host, name, ways) {
    const field = (id, label, input) => {
      input.id = `${name}-${id}`;
      return el("div", {}, el("label", { for: input.id, text: label }), input);
    };
    const plain = { spellcheck: "false", autocomplete: "off" };
    this.way = el("select", { on: { change: () => this.#arrange() } });
    this.text = el("textarea", { rows: 3, ...plain });
    this.tokens = el("textarea", { rows: 3, placeholder: "[1, 15043, 3186, …]", ...plain });
    this.keys = el("textarea", { rows: 3, placeholder: "92 hex digits each", ...plain });
    this.model = el("input", { list: "models", maxlength: 1024, ...plain });
    this.by = el("select", { on: { change: () => this.#arrange() } });
    this.salt = el("input", { type: "password", maxlength: 1024, ...plain });
    this.id = el("input", { maxlength: 16, ...plain });
    this.lora = el("input", { maxlength: 1024, ...plain });
    this.modelLabel = el("span");
    const model = field("model", "Model", this.model);
    model.firstChild.append(" ", this.modelLabel);
    this.parts = {
      text: field("text", "Prompt text", this.text),
      tokens: field("tokens", "Token ids", this.tokens),
      keys: field("keys", "Keys", this.keys),
      model,
      by: field("by", "Tenant", this.by),
      salt: field("salt", "Its cache_salt", this.salt),
      id: field("id", "Its id", this.id),
      lora: field("lora", "LoRA digest (if any)", this.lora),
    };
    const { text, tokens, keys, ...fields } = this.parts;
    this.modelLabel.className = "muted";
    host.append(
      field("way", "What", this.way),
      text,
      tokens,
      keys,
      el("div", { class: "fields" }, ...Object.values(fields)),
    );
    this.offer(ways);
  }

  offer(ways) {
    const before = this.way.value;
    this.way.replaceChildren(...ways.map((value) => el("option", { value, text: WAYS[value] })));
    if (ways.includes(before)) this.way.value = before;
    this.#arrange();
  }

  #arrange() {
    const way = this.way.value;
    const prefix = PREFIX.has(way);
    const bys = prefix ? ["none", "salt"] : ["any", "none", "salt", "id"];
    // "without a salt" of a prefix is no answer to "everything of which tenant?".
    const before = prefix === this.prefix ? this.by.value : "";
    this.prefix = prefix;
    this.by.replaceChildren(...bys.map((value) => el("option", { value, text: TENANTS[value] })));
    if (bys.includes(before)) this.by.value = before;
    const grouped = prefix || way === "group";
    const shown = {
      text: way === "text",
      tokens: way === "tokens",
      keys: way === "keys",
      model: grouped,
      by: grouped,
      salt: grouped && this.by.value === "salt",
      id: grouped && this.by.value === "id",
      lora: prefix,
    };
    for (const [name, on] of Object.entries(shown)) this.parts[name].hidden = !on;
    setText(this.modelLabel, prefix ? "(empty: the only one)" : "(empty: any)");
  }

  clear() {
    for (const f of [this.text, this.tokens, this.keys, this.model, this.salt, this.id, this.lora])
      f.value = "";
    this.by.selectedIndex = 0;
    this.#arrange();
  }

  /** Show `select`, an API `Selection`. */
  fill(select) {
    this.clear();
    const way =
      ["text", "tokens", "keys"].find((name) => select[name]) ?? (select.all ? "all" : "group");
    if (![...this.way.options].some((o) => o.value === way)) return;
    this.way.value = way;
    this.#arrange();
    this.text.value = select.text ?? "";
    this.tokens.value = (select.tokens ?? []).join(" ");
    this.keys.value = (select.keys ?? []).join("\n");
    this.model.value = select.model ?? "";
    this.lora.value = select.lora ?? "";
    const by = select.tenant_id
      ? "id"
      : select.tenant === ""
        ? "none"
        : select.tenant
          ? "salt"
          : null;
    if (by) this.by.value = by;
    this.id.value = select.tenant_id ?? "";
    this.salt.value = select.tenant ?? "";
    this.#arrange();
  }

  #tenant(prefix) {
    switch (this.by.value) {
      case "none":
        return prefix ? [{}, ""] : [{ tenant: "" }, " of requests without a salt"];
      case "salt":
        if (!this.salt.value) throw new Invalid(this.salt, "Give the tenant's cache_salt.");
        return [{ tenant: this.salt.value }, " of the tenant whose salt you gave"];
      case "id":
        if (!/^[0-9a-f]{16}$/.test(this.id.value))
          throw new Invalid(this.id, "A tenant id has 16 hex digits.");
        return [{ tenant_id: this.id.value }, ` of tenant ${this.id.value}`];
      default:
        return [{}, ""];
    }
  }

  /** `{ select, words }`; raises `Invalid`. */
  read() {
    const way = this.way.value;
    if (way === "all") return { select: { all: true }, words: "everything" };
    if (way === "keys") {
      const keys = parseKeys(this.keys);
      return {
        select: { keys },
        words: keys.length === 1 ? `chunk ${short(keys[0], 16)}` : plural(keys.length, "chunk"),
      };
    }
    const model = this.model.value.trim();
    const ofModel = model ? ` of model ${model}` : "";
    const [tenant, ofTenant] = this.#tenant(PREFIX.has(way));
    if (way === "group") {
      if (!model && this.by.value === "any") {
        throw new Invalid(this.model, "Choose a model or a tenant; or choose “everything”.");
      }
      return {
        select: { ...(model && { model }), ...tenant },
        words: `everything${ofModel}${ofTenant}`,
      };
    }
    const lora = this.lora.value.trim();
    const rest = { ...(model && { model }), ...tenant, ...(lora && { lora }) };
    const with_ = `${ofModel}${ofTenant}${lora ? ` with adapter ${short(lora)}` : ""}`;
    if (way === "tokens") {
      const tokens = parseTokens(this.tokens);
      return {
        select: { tokens, ...rest },
        words: `the prefix of ${plural(tokens.length, "token id")}${with_}`,
      };
    }
    const text = this.text.value;
    if (!text) throw new Invalid(this.text, "Give the prompt's text.");
    if (new Blob([text]).size > MOST_TEXT_BYTES)
      throw new Invalid(this.text, "At most 4 MiB of text.");
    const start = short(text.trim().replace(/\s+/g, " "), 40);
    return {
      select: { text, ...rest },
      words: `the prefix of the prompt “${start}” (${count(text.length)} characters)${with_}`,
    };
  }
}
