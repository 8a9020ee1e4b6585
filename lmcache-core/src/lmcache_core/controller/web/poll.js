// Asks the controller again and again: each resource in its own time, less often while it fails.

import { Away, Refused } from "./api.js";

const FIRST_RETRY_MS = 1000;
const LAST_RETRY_MS = 30_000;
const SLOWEST_MS = 60_000;

/**
 * `resources`: name -> { every_ms, path() }. `on`: `data(name, value)`, `problem(name, error)`,
 * `round()` after each round, `link({ up, since_ms, next_ms, error })`, `denied(error)`.
 */
export class Poller {
  #client;
  #on;
  #resources;
  #timer = null;
  #failures = 0;
  #up_ms = Date.now();
  #stop = new AbortController();
  #busy = false;
  #again = false;

  constructor(client, resources, on) {
    this.#client = client;
    this.#on = on;
    this.#resources = Object.entries(resources).map(([name, r]) => ({
      name,
      ...r,
      due: 0,
      failed: 0,
    }));
    document.addEventListener("visibilitychange", () => !document.hidden && this.now(), {
      signal: this.#stop.signal,
    });
  }

  /** Ask for everything, or `names`, at once. */
  now(...names) {
    for (const r of this.#resources) if (!names.length || names.includes(r.name)) r.due = 0;
    clearTimeout(this.#timer);
    if (this.#busy) this.#again = true;
    else return this.#round();
  }

  stop() {
    clearTimeout(this.#timer);
    this.#stop.abort();
  }

  async #round() {
    this.#busy = true;
    this.#again = false;
    const due = this.#resources.filter((r) => r.due <= Date.now());
    const settled = await Promise.all(due.map((r) => this.#ask(r)));
    this.#busy = false;
    if (this.#stop.signal.aborted) return;
    const denied = settled.find((e) => e instanceof Refused && e.status === 401);
    if (denied) return this.#on.denied(denied);
    const gone = due.length > 0 && settled.every((e) => e instanceof Away);
    this.#failures = gone ? this.#failures + 1 : 0;
    if (!gone) {
      this.#up_ms = Date.now();
      due.forEach((r, i) => settled[i] && this.#on.problem(r.name, settled[i]));
    }
    this.#on.round();
    if (this.#again) return this.#round();
    const wait_ms = this.#wait_ms();
    const next_ms = Date.now() + wait_ms;
    this.#on.link({ up: !gone, since_ms: this.#up_ms, next_ms, error: gone ? settled[0] : null });
    // Nobody looks: nothing is asked. `visibilitychange` goes on.
    if (!document.hidden) this.#timer = setTimeout(() => this.#round(), wait_ms);
  }

  async #ask(r) {
    try {
      const value = await this.#client.get(r.path(), { signal: this.#stop.signal });
      if (this.#stop.signal.aborted) return null;
      this.#on.data(r.name, value);
      r.failed = 0;
      r.due = Date.now() + r.every_ms;
      return null;
    } catch (error) {
      r.failed = Math.min(r.failed + 1, 10);
      r.due = Date.now() + Math.min(SLOWEST_MS, r.every_ms * 2 ** (r.failed - 1));
      return error;
    }
  }

  #wait_ms() {
    const jitter = 0.8 + 0.4 * Math.random();
    if (this.#failures) {
      for (const r of this.#resources) r.due = 0;
      return (
        Math.min(LAST_RETRY_MS, FIRST_RETRY_MS * 2 ** Math.min(this.#failures - 1, 10)) * jitter
      );
    }
    const next = Math.min(...this.#resources.map((r) => r.due));
    return Math.max(250, (next - Date.now()) * jitter);
  }
}
