// Numbers and times as people read them; the exact values go into titles.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
const SCALES = ["", " k", " M", " G", " T", " P"];

/** Three digits that mean something: 1.23, 12.3, 123. */
function digits(value) {
  const size = Math.abs(value);
  if (size >= 99.95 || value === 0) return whole.format(value);
  return value.toFixed(size >= 9.995 ? 1 : 2);
}

export const exact = (value) => whole.format(value);

export function bytes(value) {
  let unit = 0;
  while (Math.abs(value) >= 1023.5 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit ? digits(value) : whole.format(value)} ${UNITS[unit]}`;
}

export const exactBytes = (value) => `${whole.format(value)} bytes`;

/** 12,345 as it is; from `from` on with k, M, G. */
export function count(value, from = 100_000) {
  if (Math.abs(value) < from - 0.5) return whole.format(value);
  let scale = 0;
  while (Math.abs(value) >= 999.5 && scale < SCALES.length - 1) {
    value /= 1000;
    scale += 1;
  }
  return digits(value) + SCALES[scale];
}

/** Per second; small rates keep a digit. */
export function rate(value) {
  return value > 0 && value < 9.95 ? value.toFixed(1) : count(value, 10_000);
}

export function percent(part) {
  if (part === null || !Number.isFinite(part)) return "–";
  const value = part * 100;
  return `${value > 0 && value < 9.95 ? value.toFixed(1) : Math.round(value)} %`;
}

export function duration(seconds) {
  const s = Math.max(0, seconds);
  if (s < 9.95) return `${s.toFixed(s < 0.05 ? 0 : 1)} s`;
  if (s < 89.5) return `${Math.round(s)} s`;
  if (s < 5370) return `${Math.round(s / 60)} min`;
  const minutes = Math.round(s / 60);
  const [hours, rest] = [Math.floor(minutes / 60), minutes % 60];
  if (hours < 48) return rest ? `${hours} h ${rest} min` : `${hours} h`;
  const [days, left] = [Math.floor(hours / 24), hours % 24];
  return left && days < 10 ? `${days} d ${left} h` : `${days} d`;
}

/** "5 s ago", coarse enough not to flicker. */
export function ago(at_s, now_s) {
  const s = now_s - at_s;
  if (s < 1.5) return "now";
  return `${duration(s < 10 ? Math.round(s) : s).replace(/\.0 s$/, " s")} ago`;
}

const two = (value) => String(value).padStart(2, "0");

/** Local time: 2026-11-27 10:04:03. */
export function stamp(at_s) {
  const t = new Date(at_s * 1000);
  if (Number.isNaN(t.getTime())) return "–";
  const day = `${t.getFullYear()}-${two(t.getMonth() + 1)}-${two(t.getDate())}`;
  return `${day} ${clockTime(at_s, true)}`;
}

export function clockTime(at_s, seconds = false) {
  const t = new Date(at_s * 1000);
  const minutes = `${two(t.getHours())}:${two(t.getMinutes())}`;
  return seconds ? `${minutes}:${two(t.getSeconds())}` : minutes;
}

export const plural = (n, one, many = `${one}s`) => `${whole.format(n)} ${n === 1 ? one : many}`;

/** A long id or key with its middle left out. */
export const short = (id, keep = 12) => (id.length > keep + 1 ? `${id.slice(0, keep)}…` : id);

export const tenantName = (id) => (id === "" ? "no salt" : id);

/** "a", "a and b", "a, b and c", "a, b and 7 more". */
export function listed(names, most = 4) {
  if (names.length < 2) return names.join("");
  const shown = names.length > most ? names.slice(0, most - 1) : names.slice(0, -1);
  const last = names.length > most ? `${names.length - most + 1} more` : names.at(-1);
  return `${shown.join(", ")} and ${last}`;
}
