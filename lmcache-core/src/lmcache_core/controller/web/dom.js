// Elements and lists that are changed in place, so that focus, selection and scrolling stay.
// Data becomes text and attributes only; nothing here parses markup.

/** An element. `props`: attributes; `text`; `on`: listeners. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "text") node.textContent = value;
    else if (name === "on")
      for (const [event, f] of Object.entries(value)) node.addEventListener(event, f);
    else setAttr(node, name, value);
  }
  node.append(...children);
  return node;
}

export const byId = (id) => document.getElementById(id);

/** `null` and `false` take the attribute away. */
export function setAttr(node, name, value) {
  if (value === null || value === undefined || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
    return;
  }
  const text = value === true ? "" : String(value);
  if (node.getAttribute(name) !== text) node.setAttribute(name, text);
}

export function setText(node, text) {
  const wanted = String(text);
  const only = node.firstChild;
  if (only !== null && only.nodeType === Node.TEXT_NODE && only.nextSibling === null) {
    if (only.data !== wanted) only.data = wanted;
  } else if (only !== null || wanted !== "") {
    node.textContent = wanted;
  }
}

/** Text, and its exact value as a title. */
export function put(node, text, title = null) {
  setText(node, text);
  setAttr(node, "title", title === text ? null : title);
}

export function options(select, values, { first = null, labels = null, disabled = null } = {}) {
  const wanted = first === null ? values : ["", ...values];
  const before = select.value;
  const same =
    select.options.length === wanted.length &&
    wanted.every((v, i) => select.options[i].value === v);
  if (!same) {
    select.replaceChildren(
      ...wanted.map((value, i) => {
        const text = first !== null && i === 0 ? first : (labels?.get(value) ?? value);
        return el("option", { value, text });
      }),
    );
    if (wanted.includes(before)) select.value = before;
  }
  for (const option of select.options) option.disabled = disabled?.has(option.value) ?? false;
}

/** The items of `parent`, by key: made once, changed in place, moved only when they must. */
export class Rows {
  constructor(parent, { key, make, update, refuge }) {
    Object.assign(this, { parent, key, make, update, refuge });
    this.rows = new Map();
  }

  show(items) {
    const focused = this.parent.contains(document.activeElement) ? document.activeElement : null;
    const kept = new Map();
    for (const item of items) {
      const key = this.key(item);
      if (kept.has(key)) continue; // Two of one name: the first.
      const row = this.rows.get(key) ?? this.make(item);
      row.item = item;
      this.update(row, item);
      kept.set(key, row);
    }
    for (const [key, row] of this.rows) if (!kept.has(key)) row.node.remove();
    this.rows = kept;
    let at = this.parent.firstChild;
    for (const { node } of kept.values()) {
      if (node === at) at = at.nextSibling;
      else this.parent.insertBefore(node, at);
    }
    // A node that was moved has lost its focus; one that is gone hands it to its surroundings.
    if (focused !== null && document.activeElement !== focused) {
      (focused.isConnected ? focused : this.refuge)?.focus({ preventScroll: true });
    }
  }
}

/** A table of items. A column: `head`, `make(cell, row)` once, then `show(cell, item, row)`. */
export class Table {
  constructor(host, { label, columns, key, empty, class: name = "", cards = true }) {
    this.columns = columns;
    this.empty = el("p", { class: "empty muted", text: empty });
    // Roles are said because a narrow page lays the cells out as blocks.
    const heads = columns.map((c) =>
      el("th", { scope: "col", role: "columnheader", class: c.class ?? null, text: c.head }),
    );
    this.body = el("tbody", { role: "rowgroup" });
    const table = el(
      "table",
      { role: "table", "aria-label": label, class: `${name} ${cards ? "cards" : ""}` },
      el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...heads)),
      this.body,
    );
    this.region = el(
      "div",
      { class: "scroll", role: "region", "aria-label": label, tabindex: 0 },
      table,
    );
    host.replaceChildren(this.region, this.empty);
    this.rows = new Rows(this.body, {
      key,
      make: () => this.make(),
      update: (row, item) =>
        this.columns.forEach((column, i) => column.show?.(row.cells[i], item, row)),
      refuge: this.region,
    });
    this.show([]);
  }

  make() {
    const row = { node: el("tr", { role: "row" }) };
    row.cells = this.columns.map((column, i) => {
      const props = { role: "cell", class: column.class ?? null, "data-label": column.head };
      const cell =
        i === 0 ? el("th", { ...props, scope: "row", role: "rowheader" }) : el("td", props);
      column.make?.(cell, row);
      return cell;
    });
    row.node.append(...row.cells);
    return row;
  }

  show(items) {
    const none = items.length === 0;
    if (none && this.region.contains(document.activeElement)) {
      this.region.closest("section")?.focus({ preventScroll: true });
    }
    this.rows.show(items);
    this.region.hidden = none;
    this.empty.hidden = !none;
  }
}

/** A horizontal bar that says what it shows. */
export function bar(parts = ["fill"]) {
  const inner = parts.map((name) => el("i", { class: name }));
  const node = el("div", { class: "bar", role: "meter", "aria-valuemin": 0 }, ...inner);
  return { node, inner };
}

export function setBar({ node, inner }, shares, { label, text, now, max }) {
  shares.forEach((share, i) => {
    const width = `${(Math.min(1, Math.max(0, share || 0)) * 100).toFixed(2)}%`;
    if (inner[i].style.width !== width) inner[i].style.width = width;
    inner[i].hidden = !(share > 0);
  });
  setAttr(node, "aria-label", label);
  setAttr(node, "aria-valuetext", text);
  setAttr(node, "aria-valuenow", now);
  setAttr(node, "aria-valuemax", max);
  setAttr(node, "title", text);
}
