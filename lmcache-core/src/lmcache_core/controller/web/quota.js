// The form of a tenant's quota.

import { checked } from "./confirm.js";
import { byId, options, setText } from "./dom.js";
import { Invalid } from "./selection.js";
import { explainQuota } from "./words.js";

export class QuotaForm {
  constructor(actions) {
    this.dialog = byId("quota");
    this.form = byId("quota-form");
    this.f = this.form.elements;
    this.actions = actions;
    this.f.by.addEventListener("change", () => this.#arrange());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.dialog.addEventListener("close", () => (this.f.tenant.value = ""));
  }

  #arrange() {
    this.f.tenant.disabled = this.f.by.value === "none";
    this.f.tenant.type = this.f.by.value === "salt" ? "password" : "text";
  }

  /** `quota`: the one to change, or null. */
  open(quota = null) {
    this.form.reset();
    setText(this.form.querySelector(".error"), "");
    options(this.f.tier, ["*", ...this.actions.tierNames()], {
      labels: new Map([["*", "every tier"]]),
    });
    if (quota) {
      this.f.by.value = quota.tenant_id ? "id" : "none";
      this.f.tenant.value = quota.tenant_id;
      const unit = [2 ** 40, 2 ** 30, 2 ** 20].find((u) => quota.bytes >= u) ?? 2 ** 20;
      this.f.unit.value = String(unit);
      this.f.size.value = String(quota.bytes / unit);
      this.f.tier.value = quota.tier;
    }
    this.#arrange();
    this.dialog.showModal();
    (quota ? this.f.size : this.f.by).focus();
  }

  #read() {
    const { by, tenant, size, unit, tier } = this.f;
    const who = {
      id: `tenant ${tenant.value}`,
      salt: "the tenant whose salt you gave",
      none: "requests without a salt",
    };
    if (by.value === "id" && !/^[0-9a-f]{16}$/.test(tenant.value))
      throw new Invalid(tenant, "A tenant id has 16 hex digits.");
    if (by.value === "salt" && !tenant.value)
      throw new Invalid(tenant, "Give the tenant's cache_salt.");
    const limit = Math.round(Number(size.value) * Number(unit.value));
    if (size.value === "" || !(limit >= 0 && limit <= 2 ** 60))
      throw new Invalid(size, "Give a size from 0 to 1 EiB.");
    const whose = {
      id: { tenant_id: tenant.value },
      salt: { tenant: tenant.value },
      none: { tenant: "" },
    }[by.value];
    return { who: who[by.value], body: { bytes: limit, ...whose, tier: tier.value } };
  }

  #submit() {
    const read = checked(this.form, () => this.#read());
    if (!read) return;
    const { confirmation, done } = this.actions;
    confirmation.open(
      { method: "PUT", path: "quotas", body: read.body },
      explainQuota(read.who, read.body),
      (answer) => {
        this.dialog.close();
        done(answer);
      },
      { back: "Back" },
    );
  }
}
