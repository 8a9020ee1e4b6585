// The confirmation, and sending what was confirmed: once, whatever is pressed.

import { Away, idempotencyKey, saying } from "./api.js";
import { byId, el, setText } from "./dom.js";
import { Invalid } from "./selection.js";

/** Run `read`; an `Invalid` is said in the form, and its field gets the focus. */
export function checked(form, read) {
  const error = form.querySelector(".error");
  form.querySelectorAll("[aria-invalid]").forEach((f) => f.removeAttribute("aria-invalid"));
  setText(error, "");
  try {
    return read();
  } catch (problem) {
    if (!(problem instanceof Invalid)) throw problem;
    setText(error, problem.message);
    problem.field.setAttribute("aria-invalid", "true");
    problem.field.focus();
    return null;
  }
}

export class Confirmation {
  constructor(client) {
    this.client = client; // A function: who is signed in changes.
    this.dialog = byId("confirm");
    this.form = byId("confirm-form");
    this.go = byId("confirm-go");
    this.word = byId("word");
    this.asked = null;
    this.sending = false;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.dialog.addEventListener("cancel", (event) => this.sending && event.preventDefault());
    this.dialog.addEventListener("close", () => (this.asked = null));
  }

  /** `request`: { method, path, body }; `said`: see words.js; `done(answer)` once it was taken. */
  open(request, said, done, { back = "Cancel" } = {}) {
    // One key for this confirmation, however often it has to be sent.
    this.asked = { request, said, done, key: idempotencyKey() };
    setText(byId("confirm-title"), said.title);
    byId("confirm-words").replaceChildren(...said.words.map((text) => el("p", { text })));
    byId("confirm-typed").hidden = !said.typed;
    this.word.value = "";
    setText(this.form.querySelector(".error"), "");
    this.#button(said.verb);
    setText(this.dialog.querySelector("[data-close]"), back);
    this.go.classList.toggle("danger", said.danger);
    this.dialog.showModal();
    (said.typed
      ? this.word
      : said.danger
        ? this.dialog.querySelector("[data-close]")
        : this.go
    ).focus();
  }

  #button(text) {
    setText(this.go, text);
    this.go.setAttribute("aria-disabled", String(this.sending));
    this.dialog.querySelector("[data-close]").disabled = this.sending;
  }

  async #send() {
    const asked = this.asked;
    if (this.sending || !asked) return;
    const { request, said, key, done } = asked;
    const ready = checked(this.form, () => {
      if (said.typed && this.word.value.trim().toLowerCase() !== "clear") {
        throw new Invalid(this.word, "Type clear to go on, or cancel.");
      }
      return true;
    });
    if (!ready) return;
    this.sending = true;
    this.#button("Sending…");
    try {
      const answer = await this.client().ask(request.method, request.path, {
        body: request.body,
        key,
      });
      this.sending = false;
      this.#button(said.verb);
      this.dialog.close();
      done(answer);
    } catch (error) {
      this.sending = false;
      this.#button(error instanceof Away ? "Try again" : said.verb);
      const again = error instanceof Away ? " Trying again is safe: it counts once." : "";
      setText(this.form.querySelector(".error"), saying(error) + again);
    }
  }
}
