// The controller's HTTP API, as this page asks it.

/** The controller said no: `code` for programs, `message` and `hint` for people. */
export class Refused extends Error {
  constructor(status, { code = "", message = "", hint = "" } = {}) {
    super(message || `HTTP ${status}`);
    Object.assign(this, { status, code, hint });
  }
}

/** Nobody answered, or nobody who speaks this API. */
export class Away extends Error {}

const BASE = new URL("../v1/", import.meta.url);
const GATEWAY = new Set([502, 503, 504]);
const SKEW_S = 5; // The Date header counts whole seconds.

/** 128 random bits; `crypto.randomUUID` is missing where a page came over plain http. */
export function idempotencyKey() {
  const random = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Client {
  #token;
  #skew_s = 0;

  constructor(token) {
    this.#token = token;
  }

  /** Unix time by the controller's clock, when it differs from this machine's. */
  now_s() {
    return Date.now() / 1000 + this.#skew_s;
  }

  get(path, settings = {}) {
    return this.ask("GET", path, settings);
  }

  /** Raises `Refused` or `Away`. `key`: so that a submission sent twice counts once. */
  async ask(method, path, { body, key, timeout_ms = 15_000, signal } = {}) {
    const headers = { Authorization: `Bearer ${this.#token}`, Accept: "application/json" };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (key !== undefined) headers["Idempotency-Key"] = key;
    const limits = [AbortSignal.timeout(timeout_ms), ...(signal ? [signal] : [])];
    let answer;
    let text;
    try {
      answer = await fetch(new URL(path, BASE), {
        method,
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal: AbortSignal.any(limits),
        cache: "no-store",
        credentials: "omit",
        redirect: "error",
      });
      text = await answer.text();
    } catch (error) {
      throw new Away(error.name === "TimeoutError" ? "no answer in time" : "no connection");
    }
    this.#tune(answer.headers.get("Date"));
    let value = null;
    try {
      value = text === "" ? null : JSON.parse(text);
    } catch {
      if (answer.ok) throw new Away("the answer is no JSON");
    }
    if (answer.ok) return value;
    const problem = value?.error ?? {};
    if (GATEWAY.has(answer.status) && !problem.code) throw new Away(`HTTP ${answer.status}`);
    throw new Refused(answer.status, problem);
  }

  #tune(date) {
    const skew_s = date === null ? NaN : (Date.parse(date) - Date.now()) / 1000;
    if (Number.isFinite(skew_s)) this.#skew_s = Math.abs(skew_s) > SKEW_S ? skew_s : 0;
  }
}

/** An error in a sentence or two. */
export function saying(error) {
  if (error instanceof Away) return `The controller does not answer: ${error.message}.`;
  const sentence = /[.!?]$/.test(error.message) ? error.message : `${error.message}.`;
  return error.hint ? `${sentence} ${error.hint}` : sentence;
}
