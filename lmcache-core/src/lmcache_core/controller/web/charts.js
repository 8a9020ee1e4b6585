// Line charts of the history: axes with units, a read-out for mouse and arrow keys, a table.

import { el, put, setAttr, setText } from "./dom.js";
import { clockTime, stamp } from "./format.js";

const HEIGHT = 168;
const EDGE = { left: 62, right: 12, top: 10, bottom: 22 };
const MOST_POINTS = 600;
const TABLE_ROWS = 20;
const STEPS_S = [
  10, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400, 172_800,
  604_800,
];

function svg(tag, attributes = {}, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

/** A step of 1, 2 or 5 times a power (of ten, or of 1024 and two) that gives about `most` ticks. */
export function niceStep(top, most, binary) {
  if (binary) return 2 ** Math.ceil(Math.log2(top / most));
  const rough = top / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].find((m) => m * power >= rough * 0.999) * power;
}

/** At most `most` samples: neighbours become their mean; a `null` stays out of it. */
export function thin(samples, fields, most = MOST_POINTS) {
  if (samples.length <= most) return samples;
  const size = Math.ceil(samples.length / most);
  const out = [];
  for (let i = 0; i < samples.length; i += size) {
    const group = samples.slice(i, i + size);
    const mean = { at_s: group.at(-1).at_s };
    for (const field of fields) {
      const known = group.map((s) => s[field]).filter((v) => v !== null);
      mean[field] = known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
    }
    out.push(mean);
  }
  return out;
}

/** `lines`: [{ field, label }]; `say(value)` with its unit; `top`: a fixed upper end. */
export class Chart {
  constructor(host, { title, unit, lines, say, top = null, binary = false }) {
    Object.assign(this, {
      title,
      unit,
      lines,
      say,
      top,
      binary,
      samples: [],
      at: null,
      gap_s: Infinity,
    });
    this.values = lines.map(() => el("b", { class: "num" }));
    const legend = lines.map((line, i) => {
      const swatch = svg("svg", { width: 22, height: 8, "aria-hidden": "true", class: `line${i}` });
      swatch.append(svg("path", { d: "M0 4H22" }));
      return el("span", { class: "key" }, swatch, ` ${line.label} `, this.values[i]);
    });
    this.when = el("span", { class: "muted num when" });
    this.svg = svg("svg", { height: HEIGHT, class: "plot", "aria-hidden": "true" });
    // A slider over time: that is what screen readers can walk with arrow keys.
    this.plot = el(
      "div",
      {
        class: "plot-box",
        tabindex: 0,
        role: "slider",
        "aria-label": `${title}, by time`,
        "aria-orientation": "horizontal",
        on: {
          pointermove: (e) => this.#point(e),
          pointerleave: () => this.#read(null),
          keydown: (e) => this.#key(e),
          blur: () => this.#read(null),
        },
      },
      this.svg,
    );
    this.none = el("p", { class: "none muted", text: "Nothing has been seen yet." });
    this.rows = el("tbody");
    const heads = ["Time", ...lines.map((l) => `${l.label}, ${unit}`)];
    this.table = el(
      "details",
      { class: "as-table", on: { toggle: () => this.#fill() } },
      el("summary", { text: "As a table" }),
      el(
        "div",
        { class: "scroll", tabindex: 0, role: "region", "aria-label": `${title}, table` },
        el(
          "table",
          {},
          el("caption", { class: "away-from-eyes", text: title }),
          el(
            "thead",
            {},
            el(
              "tr",
              {},
              ...heads.map((text, i) => el("th", { scope: "col", text, class: i ? "num" : null })),
            ),
          ),
          this.rows,
        ),
      ),
    );
    host.append(
      el(
        "figure",
        { class: "chart" },
        el(
          "figcaption",
          {},
          el("span", { class: "chart-title" }, el("h3", { text: title }), this.when),
          el("span", { class: "legend" }, ...legend),
        ),
        this.plot,
        this.none,
        this.table,
      ),
    );
    // In the next frame: what is drawn in this one may change sizes that were just told.
    new ResizeObserver(() => requestAnimationFrame(() => this.#draw())).observe(this.plot);
  }

  show(samples, interval_s) {
    this.samples = thin(
      samples,
      this.lines.map((l) => l.field),
    );
    const step_s =
      this.samples.length > 1
        ? (this.samples.at(-1).at_s - this.samples[0].at_s) / (this.samples.length - 1)
        : interval_s;
    this.gap_s = 2.5 * Math.max(interval_s, Math.min(step_s, interval_s * 50));
    if (this.at !== null && this.at >= this.samples.length) this.at = null;
    this.#draw();
    this.#fill();
  }

  #scale() {
    const width = Math.max(160, this.plot.clientWidth);
    const [first, last] = [this.samples[0]?.at_s ?? 0, this.samples.at(-1)?.at_s ?? 1];
    const span = Math.max(1, last - first);
    let high = this.top ?? 0;
    if (this.top === null) {
      for (const s of this.samples)
        for (const { field } of this.lines) high = Math.max(high, s[field] ?? 0);
      high = high || 1;
    }
    const step = this.top === null ? niceStep(high, 4, this.binary) : this.top / 4;
    const top = Math.ceil(high / step - 1e-9) * step;
    const inner = { w: width - EDGE.left - EDGE.right, h: HEIGHT - EDGE.top - EDGE.bottom };
    return {
      width,
      first,
      last,
      span,
      step,
      top,
      x: (at_s) => EDGE.left + ((at_s - first) / span) * inner.w,
      y: (value) => EDGE.top + (1 - value / top) * inner.h,
    };
  }

  #draw() {
    const empty = this.samples.length < 2;
    this.none.hidden = !empty;
    this.plot.classList.toggle("empty", empty);
    const scale = (this.scale = this.#scale());
    const { width, x, y } = scale;
    setAttr(this.svg, "width", width);
    setAttr(this.svg, "viewBox", `0 0 ${width} ${HEIGHT}`);
    const parts = [];
    for (let value = 0; value <= scale.top * 1.001; value += scale.step) {
      const at = y(value).toFixed(1);
      parts.push(svg("path", { class: "grid", d: `M${EDGE.left} ${at}H${width - EDGE.right}` }));
      parts.push(
        svg(
          "text",
          { x: EDGE.left - 6, y: at, dy: "0.35em", "text-anchor": "end" },
          this.say(value),
        ),
      );
    }
    if (!empty) parts.push(...this.#times(scale));
    this.lines.forEach(({ field }, i) =>
      parts.push(svg("path", { class: `line line${i}`, d: empty ? "" : this.#path(field, x, y) })),
    );
    this.cursor = svg("g", { class: "cursor", visibility: "hidden" });
    parts.push(this.cursor);
    this.svg.replaceChildren(...parts);
    this.#read(this.at);
  }

  #times({ first, last, span, x, width }) {
    const step_s = STEPS_S.find((s) => span / s <= (width - EDGE.left) / 76) ?? STEPS_S.at(-1);
    const shift_s = new Date(first * 1000).getTimezoneOffset() * 60;
    const parts = [];
    for (
      let at_s = Math.ceil((first - shift_s) / step_s) * step_s + shift_s;
      at_s <= last;
      at_s += step_s
    ) {
      const text = step_s >= 43_200 ? stamp(at_s).slice(5, 10) : clockTime(at_s, step_s < 60);
      const at = x(at_s).toFixed(1);
      parts.push(svg("path", { class: "tick", d: `M${at} ${HEIGHT - EDGE.bottom}v4` }));
      if (x(at_s) < EDGE.left + 14 || x(at_s) > width - EDGE.right - 6) continue;
      parts.push(svg("text", { x: at, y: HEIGHT - 6, "text-anchor": "middle" }, text));
    }
    return parts;
  }

  #path(field, x, y) {
    let d = "";
    let before = null;
    for (const sample of this.samples) {
      const value = sample[field];
      if (value === null) {
        before = null;
        continue;
      }
      const on = before !== null && sample.at_s - before <= this.gap_s;
      d += `${on ? "L" : "M"}${x(sample.at_s).toFixed(1)} ${y(value).toFixed(1)}`;
      if (!on) d += "h.01"; // So that a lone point can be seen.
      before = sample.at_s;
    }
    return d;
  }

  /** Show the values of sample number `at`; of the newest when `null`. */
  #read(at) {
    this.at = at;
    const last = this.samples.length - 1;
    const sample = this.samples[at ?? last];
    setText(this.when, sample ? (at === null ? "" : "at ") + clockTime(sample.at_s, true) : "");
    const said = this.lines.map(({ field, label }, i) => {
      const value = sample?.[field] ?? null;
      const text = value === null ? "–" : this.say(value);
      put(this.values[i], text, value === null ? null : `${value} ${this.unit}`);
      return `${label} ${value === null ? "unknown" : text}`;
    });
    setAttr(this.plot, "aria-valuemin", 0);
    setAttr(this.plot, "aria-valuemax", Math.max(0, last));
    setAttr(this.plot, "aria-valuenow", at ?? Math.max(0, last));
    setAttr(
      this.plot,
      "aria-valuetext",
      sample ? `${stamp(sample.at_s)}: ${said.join(", ")}` : "nothing yet",
    );
    if (!this.cursor) return;
    this.cursor.setAttribute("visibility", at === null || !sample ? "hidden" : "visible");
    if (at === null || !sample) return;
    const { x, y } = this.scale;
    const to = x(sample.at_s).toFixed(1);
    const dots = this.lines.flatMap(({ field }, i) =>
      sample[field] === null
        ? []
        : [svg("circle", { class: `line${i}`, cx: to, cy: y(sample[field]).toFixed(1), r: 3.5 })],
    );
    this.cursor.replaceChildren(
      svg("path", { class: "cross", d: `M${to} ${EDGE.top}V${HEIGHT - EDGE.bottom}` }),
      ...dots,
    );
  }

  #point(event) {
    if (this.samples.length < 2) return;
    const { first, span, width } = this.scale;
    const from = event.clientX - this.plot.getBoundingClientRect().left - EDGE.left;
    const at_s = first + (from / (width - EDGE.left - EDGE.right)) * span;
    let best = 0;
    this.samples.forEach((s, i) => {
      if (Math.abs(s.at_s - at_s) < Math.abs(this.samples[best].at_s - at_s)) best = i;
    });
    this.#read(best);
  }

  #key(event) {
    const last = this.samples.length - 1;
    const at = this.at ?? last;
    const to = {
      ArrowLeft: at - 1,
      ArrowRight: at + 1,
      ArrowDown: at - 1,
      ArrowUp: at + 1,
      PageDown: at - 10,
      PageUp: at + 10,
      Home: 0,
      End: last,
    }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.#read(Math.min(last, Math.max(0, to)));
  }

  #fill() {
    if (!this.table.open) return this.rows.replaceChildren();
    const rows = thin(
      this.samples,
      this.lines.map((l) => l.field),
      TABLE_ROWS,
    ).toReversed();
    this.rows.replaceChildren(
      ...rows.map((s) =>
        el(
          "tr",
          {},
          el("th", { scope: "row", text: stamp(s.at_s) }),
          ...this.lines.map(({ field }) =>
            el("td", { class: "num", text: s[field] === null ? "–" : this.say(s[field]) }),
          ),
        ),
      ),
    );
  }
}
