"""The way from an instance's first word to the end of a job."""

from __future__ import annotations

from controller_rig import CHUNK, keys_of, model, prompt, rig

from lmcache_core.agent import wire
from lmcache_core.controller import messages


def test_from_first_word_to_a_cleared_prefix() -> None:
    served = model()
    tokens = prompt(3)
    keys = keys_of(served, tokens)
    with rig() as made:
        one = made.instance("one", models=(served,))
        other = made.instance("other", models=(served,))
        for instance in (one, other):
            assert not instance.sync().resync
        one.stores("host", keys)
        one.stores("disk", keys[:1])
        other.stores("disk", keys[:2])

        found = made.post("/v1/lookup", {"select": {"tokens": [*tokens, 1, 2]}})
        assert found["model"] == "m" and found["prompt_tokens"] == 3 * CHUNK + 2
        assert found["keys"] == [key.hex() for key in keys]
        assert found["instances"] == [
            {"instance": "one", "chunks": 3, "tokens": 3 * CHUNK, "tiers": [
                {"tier": "host", "chunks": 3, "tokens": 3 * CHUNK},
                {"tier": "disk", "chunks": 1, "tokens": CHUNK},
            ]},
            {"instance": "other", "chunks": 2, "tokens": 2 * CHUNK, "tiers": [
                {"tier": "disk", "chunks": 2, "tokens": 2 * CHUNK},
            ]},
        ]  # fmt: skip

        job = made.post("/v1/clear", {"select": {"tokens": tokens}})
        assert (job["state"], len(job["parts"])) == ("running", 2)
        (order,) = one.take()
        assert isinstance(order, wire.Clear) and wire.split(order.keys or b"") == keys
        one.orders = [order]
        one.obey()
        assert one.recorded == [order.id]
        assert made.job(job["id"]).state == "running", "the other has not done its part"
        other.obey()
        done = made.job(job["id"])
        assert (done.state, done.settled) == ("done", 6)
        left = made.post("/v1/lookup", {"select": {"tokens": tokens}})
        assert left["instances"] == []
        health = made.get("/v1/health", messages.HealthReply)
        assert (health.status, health.instances, health.chunks) == ("ok", 2, 0)
