"""What operators ask of a controller in tests."""

from __future__ import annotations

from typing import Any

import msgspec
from controller_rig import (
    FakeInstance,
    Rig,
    keys_of,
    model,
    prompt,
    until,
)

from lmcache_core.agent import wire
from lmcache_core.controller import messages

SERVED = model()
TOKENS = prompt(3)
KEYS = keys_of(SERVED, TOKENS)
SELECT = {"tokens": TOKENS, "model": "m"}


def greeted(made: Rig, name: str = "i0", **fields: Any) -> FakeInstance:
    given = {"models": (SERVED,), "status": {"channel": f"tcp://{name}:1"}, **fields}
    instance: FakeInstance = made.instance(name, **given)
    instance.sync()
    return instance


def ask(made: Rig, op: str, *, status: int = 0, key: str = "", **body: Any) -> Any:
    found = made.post(f"/v1/{op}", {"select": SELECT, **body}, status=status, key=key)
    if status >= 400:
        return msgspec.convert(found, messages.Problem).error
    return msgspec.convert(found, messages.Pin if op == "pins" else messages.Job)


def place(instance: str, tier: str) -> dict[str, str]:
    return {"instance": instance, "tier": tier}


def asked(instance: FakeInstance) -> wire.Question:
    """The question that an instance is asked, waited for."""
    until(lambda: instance.sync(wait_s=1.0) and instance.questions)
    (question,) = instance.questions
    return question


def until_ended(made: Rig, job: str, *instances: FakeInstance) -> messages.Job:
    """The job when its instances have done all that they were told."""

    def ended() -> bool:
        for instance in instances:
            instance.obey()
        return made.job(job).state != "running"

    until(ended)
    return made.job(job)


def pins(made: Rig) -> list[messages.Pin]:
    found: list[messages.Pin] = made.get("/v1/pins", messages.Pins).pins
    return found
