// What an action will do, in words, before it is sent.

import { bytes, duration, exact, listed, plural, stamp } from "./format.js";

const everywhere = (names, none) => (names?.length ? listed(names, 6) : none);

/** How much a selection of a model, tenant or all takes now: from `usage`; null when not known. */
export function estimate(body, usage) {
  const { select } = body;
  if (!usage || select.text || select.tokens || select.keys || select.tenant) return null;
  const tiers = body.tiers ?? (body.tier ? [body.tier] : body.source ? [body.source.tier] : []);
  const instances = body.source ? [body.source.instance] : (body.instances ?? []);
  const tenant = select.tenant_id ?? select.tenant;
  const mine = usage.usage.filter(
    (u) =>
      (!select.model || u.model === select.model) &&
      (tenant === undefined || u.tenant_id === tenant) &&
      (!tiers.length || tiers.includes(u.tier)) &&
      (!instances.length || instances.includes(u.instance)),
  );
  const sum = (pick) => mine.reduce((n, u) => n + pick(u), 0);
  const least = usage.truncated ? "at least " : "";
  const [chunks, size] = [sum((u) => u.chunks), sum((u) => u.bytes)];
  return `Now that is ${least}${plural(chunks, "chunk")}, ${bytes(size)}, on ${plural(
    new Set(mine.map((u) => u.instance)).size,
    "instance",
  )}.`;
}

const place = ({ instance, tier }) => `${tier} of ${instance}`;

/** Sentences, what the button says, and what else to ask, for a request of `kind`. */
export function explain(kind, what, body, { usage, now_s }) {
  const much = estimate(body, usage);
  const on = everywhere(body.instances, "every instance");
  const holders = everywhere(body.instances, "every instance that has some of it");
  const say = (title, verb, ...sentences) => ({
    title,
    verb,
    danger: false,
    typed: false,
    words: [...sentences, much].filter(Boolean),
  });
  switch (kind) {
    case "pin":
      return say(
        "Pin?",
        "Pin",
        `Keeps ${what} in tier ${body.tier} of ${holders}.`,
        `It stays for ${duration(body.ttl_s)}, until ${stamp(now_s + body.ttl_s)}, for owner ` +
          `${body.owner}. Eviction passes it by, so other prefixes have less room.`,
      );
    case "copy":
      return say(
        "Copy?",
        "Copy",
        `Copies ${what} from ${place(body.source)} to ${place(body.target)}.`,
        "The source keeps what it has. The target may evict other chunks to make room.",
      );
    case "move":
      return say(
        "Move?",
        "Move",
        `Copies ${what} from ${place(body.source)} to ${place(body.target)}.`,
        "Then it deletes from the source what the target has confirmed, and nothing else.",
      );
    case "clear": {
      const all = body.select.all === true;
      const tiers = body.tiers?.length ? `tier ${listed(body.tiers)}` : "every tier";
      return {
        ...say(
          all ? "Clear everything?" : "Clear?",
          all ? "Clear everything" : "Clear",
          `Deletes ${what} from ${tiers} of ${on}.`,
          "Pins of it end, and requests that need it prefill again. This can't be undone.",
        ),
        danger: true,
        typed: all,
      };
    }
    case "compress":
      return say(
        "Compress?",
        "Compress",
        `Stores ${what} again in tier ${body.tier} of ${on}, with codec ${body.codec}${
          body.level ? ` at level ${body.level}` : ""
        }.`,
        "Chunks can be read while it runs. What a codec loses, decompressing does not bring back.",
      );
    default:
      return say(
        "Decompress?",
        "Decompress",
        `Stores ${what} again in tier ${body.tier} of ${on}, without a codec.`,
        "It takes more room then.",
      );
  }
}

export const explainUnpin = (pin) => ({
  title: "Unpin?",
  verb: "Unpin",
  danger: false,
  typed: false,
  words: [
    `Ends pin ${pin.id} of ${pin.owner}: ${plural(pin.chunks, "chunk")} of ${pin.model} in tier ${
      pin.tier
    } of ${everywhere(pin.instances, "no instance")}.`,
    "They stay until eviction takes them.",
  ],
});

export const explainCancel = (job) => ({
  title: "Cancel job?",
  verb: "Cancel the job",
  danger: true,
  typed: false,
  words: [
    `Stops ${job.kind} job ${job.id}. What it has done stays done: ${exact(
      job.settled,
    )} of ${plural(job.total, "chunk")}.`,
  ],
});

export const explainQuota = (who, body) => ({
  title: "Set quota?",
  verb: "Set the quota",
  danger: false,
  typed: false,
  words: [
    `Lets ${who} take at most ${bytes(body.bytes)} in ${
      body.tier === "*" ? "each tier" : `tier ${body.tier}`
    } of each instance.`,
    body.bytes === 0
      ? "Nothing of it is kept there then."
      : "What is above it is evicted; its own chunks only.",
  ],
});

export function explainUnlimit(quota) {
  const who = quota.tenant_id ? `tenant ${quota.tenant_id}` : "requests without a salt";
  const tier = quota.tier === "*" ? "each tier" : `tier ${quota.tier}`;
  return {
    title: "Remove quota?",
    verb: "Remove the quota",
    danger: false,
    typed: false,
    words: [
      `Lets ${who} take as much in ${tier} as there is room, not ${bytes(quota.bytes)} at most.`,
    ],
  };
}
