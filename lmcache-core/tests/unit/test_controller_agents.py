"""Real engines and the real controller: what one says, the other understands."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from agent_rig import joined, settled, truth
from controller_rig import INSTANCE_TOKEN, Clock, Rig, rig, until
from scripted import CHUNK, LAYOUT, Make, Pages, Scripted, make, prompt

from lmcache_core.agent import wire
from lmcache_core.agent.wire import tenant_id
from lmcache_core.controller import messages
from lmcache_core.engine import CacheEngine
from lmcache_core.keys import Namespace
from lmcache_core.layout import LayoutSpec

__all__ = ["make"]
NAMESPACE = Namespace.of({"model": "unit"})
SERVED = wire.Model(
    "unit", NAMESPACE.tag, NAMESPACE.pairs, CHUNK, "sha256",
    (wire.ChunkKind(bytes(6), LayoutSpec.of(LAYOUT)),),
)  # fmt: skip
CHUNKS = 3


def store(engine: CacheEngine, seed: int) -> list[int]:
    """A prompt whose chunks are in every tier."""
    with engine.owner:
        engine.store(prompt(seed, CHUNKS), Pages(seed))
    settled(engine)
    return prompt(seed, CHUNKS)


@contextlib.contextmanager
def linked(made: Rig, engine: CacheEngine) -> Iterator[Any]:
    """``engine`` as instance ``e1``."""
    address: Any = SimpleNamespace(url=made.url)
    with joined(engine, address, token=INSTANCE_TOKEN, models=(SERVED,)) as agent:
        yield agent


def follows(made: Rig, engine: CacheEngine) -> bool:
    """Whether the controller knows exactly what the engine holds."""
    record = made.controller.registry.records.get("e1")
    if record is None or not record.synced:
        return False
    held = made.controller.directory._slots[record.slot].keys
    return held == {key for _, key in truth(engine)}


def operated(made: Rig, op: str, **body: Any) -> messages.Job:
    """The job of an operation when it has ended well."""
    found = made.post(f"/v1/{op}", body)
    job = made.job(found["job"] if op == "pins" else found["id"], wait_s=10)
    assert job.state == "done", job
    return job


def where(made: Rig, tokens: list[int]) -> dict[str, int]:
    """Chunks of a prompt by tier."""
    found = made.post("/v1/lookup", {"select": {"tokens": tokens}})["instances"]
    return {tier["tier"]: tier["chunks"] for row in found for tier in row["tiers"]}


def test_a_real_engine_is_followed_and_obeys(make: Make) -> None:
    engine = make(Scripted(), Scripted())
    with rig(clock=Clock(time.time())) as made, linked(made, engine):
        one, two = store(engine, 1), store(engine, 2)
        until(lambda: follows(made, engine))
        assert where(made, one) == {"host": CHUNKS, "t0": CHUNKS, "t1": CHUNKS}
        select = {"tokens": one}

        job = operated(made, "clear", select=select, tiers=["t0"])
        assert job.settled == CHUNKS
        until(lambda: where(made, one) == {"host": CHUNKS, "t1": CHUNKS})
        places = {
            "source": {"instance": "e1", "tier": "t1"},
            "target": {"instance": "e1", "tier": "t0"},
        }
        operated(made, "move", select=select, **places)
        until(lambda: where(made, one) == {"host": CHUNKS, "t0": CHUNKS})
        assert where(made, two) == {"host": CHUNKS, "t0": CHUNKS, "t1": CHUNKS}

        operated(made, "pins", select=select, owner="me", ttl_s=60)
        pinned = made.get("/v1/instances/e1", messages.Instance).tiers[0]
        until(lambda: made.get("/v1/instances/e1", messages.Instance).tiers[0].pinned_bytes)
        assert pinned.chunks == 2 * CHUNKS
        (pin,) = made.get("/v1/pins")["pins"]
        ending = made.client.delete(f"/v1/pins/{pin['id']}").json()
        assert made.job(ending["id"], wait_s=10).state == "done"
        until(lambda: not made.get("/v1/instances/e1", messages.Instance).tiers[0].pinned_bytes)

        operated(made, "clear", select={"model": "unit"})
        until(lambda: where(made, two) == {} and follows(made, engine))
        assert truth(engine) == set()


def test_a_real_engine_comes_back_to_a_restarted_controller(make: Make) -> None:
    engine = make(Scripted())
    with rig() as made, linked(made, engine):
        tokens = store(engine, 1)
        until(lambda: follows(made, engine))
        record = made.controller.registry.records["e1"]
        record.synced = False  # as if a sync had been lost
        until(lambda: follows(made, engine))
        assert where(made, tokens) == {"host": CHUNKS, "t0": CHUNKS}


def test_a_tenants_share_is_limited_and_its_chunks_cleared(make: Make) -> None:
    engine = make(Scripted())
    note = wire.NamespaceNote(NAMESPACE.tag, NAMESPACE.tag, tenant_id("hush"))
    with rig() as made, linked(made, engine) as agent:
        agent.saw_namespace(note)
        tokens = store(engine, 1)
        until(lambda: made.controller.names.note(NAMESPACE.tag))
        made.client.put("/v1/quotas", json={"bytes": 123, "tenant": "hush"})
        until(lambda: agent._limits == (wire.Limit(NAMESPACE.tag, "*", 123),))
        operated(made, "clear", select={"tenant": "hush"})
        until(lambda: where(made, tokens) == {})
