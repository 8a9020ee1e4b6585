// Who is signed in, what is asked how often, and which part shows what.

import { Actions, taken } from "./actions.js";
import { Away, Client, Refused, saying } from "./api.js";
import { Confirmation } from "./confirm.js";
import { Details } from "./details.js";
import { byId, el, put, setAttr, setText } from "./dom.js";
import { attention, instancesView, overTime, summary } from "./fleet.js";
import { ago, clockTime, duration } from "./format.js";
import { pinsView, prefixesView, usageView } from "./holdings.js";
import { JobsView } from "./jobs.js";
import { Lookup, Misses } from "./lookup.js";
import { Poller } from "./poll.js";
import { Shortcuts, Themes, dialogs, say, stored, toast, visit } from "./shell.js";

const KEPT_TOKEN = "lmcache-token";
const PREFIXES = 50;
const RESOURCES = {
  health: { every_ms: 3000, path: () => "health" },
  instances: { every_ms: 3000, path: () => "instances" },
  jobs: { every_ms: 2000, path: jobsPath },
  pins: { every_ms: 10_000, path: () => "pins" },
  history: { every_ms: 10_000, path: () => "history" },
  usage: { every_ms: 15_000, path: () => "usage" },
  quotas: { every_ms: 15_000, path: () => "quotas" },
  prefixes: { every_ms: 15_000, path: () => `prefixes?limit=${PREFIXES}` },
};
/** Whose section says that a resource can't be read. */
const SECTIONS = {
  health: "attention",
  instances: "instances",
  jobs: "jobs",
  pins: "pins",
  history: "time",
  usage: "usage",
  quotas: "usage",
  prefixes: "prefixes",
};

function jobsPath() {
  const state = byId("job-state").value;
  return `jobs?limit=${byId("job-limit").value}${state ? `&state=${state}` : ""}`;
}

/** What was told last; `changed` since it was last shown. */
class Store {
  values = {};
  changed = new Set();
  client = null;

  now_s() {
    return this.client?.now_s() ?? Date.now() / 1000;
  }

  put(name, value) {
    this.values[name] = value;
    this.changed.add(name);
  }

  clear() {
    this.values = {};
    this.changed.clear();
  }
}

class Page {
  constructor() {
    this.store = new Store();
    this.poller = null;
    this.link = null;
    this.said_up = true;
    const client = () => this.store.client;
    const now_s = () => this.store.now_s();
    this.confirmation = new Confirmation(client);
    this.actions = new Actions(this.confirmation, this.store, (answer) => this.taken(answer));
    this.details = new Details(client);
    this.jobs = new JobsView(
      byId("jobs"),
      {
        details: (job) => this.details.job(job),
        cancel: (job) => this.actions.cancel(job),
        say: (text) => toast(text),
        load: (id) => client().get(`jobs/${encodeURIComponent(id)}`),
      },
      now_s,
    );
    this.lookup = new Lookup(client, (kind, given) => this.actions.open(kind, given));
    this.misses = new Misses(client);
    this.views = [
      summary(document.querySelector("#summary dl")),
      overTime(document.querySelector("#time .charts"), byId("range")),
      attention(),
      instancesView(
        byId("instances"),
        byId("filter"),
        {
          details: (i) => this.details.instance(i),
          on: (i) => this.actions.open("copy", { instance: i.name }),
        },
        now_s,
      ),
      this.jobs,
      pinsView(byId("pins"), { unpin: (pin) => this.actions.unpin(pin) }, now_s),
      usageView(byId("usage"), {
        quota: (quota) => this.actions.quota.open(quota),
        unlimit: (quota) => this.actions.unlimit(quota),
        clear: (u) =>
          this.actions.open("clear", {
            tiers: [u.tier],
            select: {
              model: u.model,
              ...(u.tenant_id ? { tenant_id: u.tenant_id } : { tenant: "" }),
            },
          }),
      }),
      prefixesView(byId("prefixes"), { lookup: (prefix) => this.lookup.key(prefix.key) }),
    ];
    this.themes = new Themes(byId("theme"));
    dialogs();
    this.#listen();
    setInterval(() => this.#tellLink(), 1000);
  }

  #listen() {
    const press = (id, act) => byId(id).addEventListener("click", act);
    press("new-action", () => this.actions.open("pin"));
    press("new-pin", () => this.actions.open("pin"));
    press("new-quota", () => this.actions.quota.open());
    press("help-open", openHelp);
    press("try-now", () => this.poller?.now());
    press("sign-out", () => this.signOut(""));
    for (const id of ["job-state", "job-limit"]) {
      byId(id).addEventListener("change", () => this.poller?.now("jobs"));
    }
    byId("sign-in-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.signIn(byId("token").value.trim(), byId("keep").checked);
    });
    const go = (key, id, name) => [key, `Go to ${name}`, () => visit(id)];
    this.shortcuts = new Shortcuts(
      [
        ["?", "This list", openHelp],
        ["n", "New action", () => this.actions.open("pin")],
        ["/", "Filter instances", () => byId("filter").focus()],
        ["r", "Ask for everything now", () => this.poller.now()],
        ["t", "Next theme", () => this.themes.next()],
        go("i", "instances", "instances"),
        go("a", "attention", "attention"),
        go("o", "time", "over time"),
        go("j", "jobs", "jobs"),
        go("p", "pins", "pins"),
        go("u", "usage", "usage"),
        go("x", "prefixes", "prefixes"),
        go("l", "lookup", "lookup"),
        go("m", "misses", "misses"),
      ],
      () => this.poller !== null,
    );
  }

  /** `kept`: a token that was accepted before, which waits for a controller that is away. */
  async signIn(token, keep, { kept = false } = {}) {
    setText(byId("sign-in-error"), "");
    const client = new Client(token);
    try {
      this.store.put("health", await client.get("health"));
    } catch (error) {
      if (kept && error instanceof Away) return this.#start(client);
      const denied = error instanceof Refused && error.status === 401;
      return this.signOut(denied ? `This token was not accepted. ${error.hint}` : saying(error), {
        keep: !denied,
      });
    }
    if (keep) stored("sessionStorage", KEPT_TOKEN, token);
    byId("token").value = "";
    this.#start(client);
  }

  #start(client) {
    this.poller?.stop();
    this.store.client = client;
    this.#arrange(true);
    byId("main").focus({ preventScroll: true });
    this.poller = new Poller(client, RESOURCES, {
      data: (name, value) => {
        this.store.put(name, value);
        this.#problem(name, null);
      },
      problem: (name, error) => this.#problem(name, error),
      round: () => this.show(),
      link: (link) => {
        this.link = link;
        this.#tellLink();
      },
      denied: () => this.signOut("The token is no longer accepted."),
    });
    this.poller.now();
  }

  /** Forget token and data; `why` is said beside the form. */
  signOut(why, { keep = false } = {}) {
    this.poller?.stop();
    Object.assign(this, { poller: null, link: null });
    this.store.client = null;
    this.store.clear();
    if (!keep) stored("sessionStorage", KEPT_TOKEN, null);
    for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
    this.lookup.clear();
    this.misses.clear();
    this.jobs.followed.clear();
    this.#arrange(false);
    this.#tellLink();
    setText(byId("sign-in-error"), why);
    byId("token").focus();
    byId("token").select();
  }

  #arrange(signedIn) {
    byId("board").hidden = !signedIn;
    byId("sign-in").hidden = signedIn;
    byId("new-action").hidden = byId("sign-out").hidden = !signedIn;
  }

  /** Show what has changed; one part that fails leaves the others alone. */
  show() {
    const { values, changed } = this.store;
    for (const view of this.views) {
      if (!view.needs.some((name) => changed.has(name)) || view.needs.some((name) => !values[name]))
        continue;
      try {
        view.show(values);
      } catch (error) {
        console.error(error);
        this.#problem(view.needs[0], new Error("The page does not understand the answer"));
      }
    }
    if (changed.has("instances")) this.#models();
    changed.clear();
    document.body.classList.add("filled");
    this.details.refresh();
  }

  #models() {
    const names = [
      ...new Set((this.store.values.instances?.instances ?? []).flatMap((i) => i.models)),
    ].sort();
    const list = byId("models");
    if ([...list.options].map((o) => o.value).join("\n") === names.join("\n")) return;
    list.replaceChildren(...names.slice(0, 200).map((value) => el("option", { value })));
  }

  #problem(name, error) {
    const line = byId(SECTIONS[name]).querySelector(".problem");
    const whose = line.dataset.of;
    if (!error && whose !== undefined && whose !== name) return;
    line.hidden = !error;
    if (error) {
      line.dataset.of = name;
      setText(line, `What is shown may be old. ${saying(error)}`);
    } else delete line.dataset.of;
  }

  #tellLink() {
    const stale = byId("stale");
    const up = this.link?.up ?? true;
    const health = this.store.values.health;
    const state = !this.poller ? "none" : up ? (health?.status ?? "none") : "away";
    setAttr(byId("status"), "data-state", state);
    const texts = {
      none: this.poller ? "Asking…" : "Not signed in",
      ok: "Healthy",
      degraded: "Degraded",
      away: "No answer",
    };
    put(
      byId("status-text"),
      texts[state] ?? state,
      health && this.poller
        ? `version ${health.version}, up for ${duration(health.uptime_s)}, state in ${health.state}`
        : null,
    );
    setText(byId("fresh"), this.link ? freshness(this.link) : "");
    stale.hidden = up;
    if (!up) {
      const { since_ms, next_ms, error } = this.link;
      const wait_s = Math.max(0, (next_ms - Date.now()) / 1000);
      setText(
        byId("stale-text"),
        `The controller does not answer (${error.message}). What you see is from ${clockTime(
          since_ms / 1000,
          true,
        )}. ${wait_s < 1 ? "Asking again…" : `Next try in ${Math.ceil(wait_s)} s.`}`,
      );
    }
    if (up !== this.said_up)
      say(up ? "The controller answers again." : "The controller does not answer.");
    this.said_up = up;
  }

  async #follow(id) {
    try {
      this.jobs.follow(await this.store.client.get(`jobs/${encodeURIComponent(id)}`));
    } catch (error) {
      say(`Its job can't be followed. ${saying(error)}`);
    }
  }

  taken(answer) {
    const { id, job, text } = taken(answer);
    byId("job-state").value = "";
    if (job?.state === "running") this.jobs.follow(job);
    else if (job) this.poller?.now("jobs");
    else if (id) this.#follow(id);
    toast(text, id && ["Show job", () => this.jobs.reveal(id)]);
    this.poller?.now();
  }
}

function openHelp() {
  byId("help").showModal();
  byId("help").querySelector("[data-close]").focus();
}

const freshness = ({ since_ms }) => `updated ${ago(since_ms / 1000, Date.now() / 1000)}`;

const page = new Page();
const kept = stored("sessionStorage", KEPT_TOKEN);
if (kept) page.signIn(kept, true, { kept: true });
else page.signOut("");
