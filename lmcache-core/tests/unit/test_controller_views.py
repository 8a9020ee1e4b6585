"""What is shown of instances, and what reaches them: rates, usage, peers, limits."""

from __future__ import annotations

import threading
import time
from typing import Any

import msgspec
import pytest
from controller_rig import GIB, Rig, keys_of, model, namespace_of, prompt, rig, tier, until

from lmcache_core.agent import wire
from lmcache_core.agent.wire import tenant_id
from lmcache_core.controller import messages
from lmcache_core.keys import Namespace

SERVED = model()
TOKENS = prompt(4)
KEYS = keys_of(SERVED, TOKENS)


def greeted(made: Rig, name: str = "i0", **fields: Any) -> Any:
    instance = made.instance(name, **{"models": (SERVED,), **fields})
    assert not instance.sync().resync
    return instance


def shown(made: Rig, name: str = "i0") -> messages.Instance:
    found: messages.Instance = made.get(f"/v1/instances/{name}", messages.Instance)
    return found


def test_rates_are_of_the_last_minute() -> None:
    with rig(sample_s=0.02) as made:
        instance = made.instance(models=(SERVED,))

        def counts(seconds: int) -> None:
            counters = {
                "vllm.requested_tokens": 100 * seconds, "vllm.hit_tokens.host": 30 * seconds,
                "vllm.hit_tokens.disk": 20 * seconds, "vllm.stored_tokens": 10 * seconds,
                "disk.read_bytes": 7 * seconds, "disk.stored_bytes": 5 * seconds,
                "host.read_bytes": 1, "disk.corrupt": 3, "vllm.load_failed": 0,
            }  # fmt: skip
            status = msgspec.structs.replace(instance.says(), counters=counters)
            instance.sync(status=status)

        for seconds in range(0, 200, 10):
            counts(seconds)
            made.clock.now_s += 10
        made.clock.now_s -= 10
        rates = shown(made).rates
        found = [round(rate) for rate in (rates.requested_tokens, rates.hit_tokens)]
        assert found == [100, 50]
        assert (round(rates.stored_tokens), round(rates.read_bytes)) == (10, 7)
        assert round(rates.write_bytes) == 5
        assert shown(made).errors == {"disk.corrupt": 3}
        counts(1)  # another's counters: they never fall
        assert shown(made).rates.requested_tokens == 0

        def rates_seen() -> list[messages.Sample]:
            history: messages.History = made.get("/v1/history", messages.History)
            return [sample for sample in history.samples if sample.hit_rate is not None]

        def asked() -> float:
            return sum(sample.requested_tokens for sample in rates_seen()) * 0.02

        until(lambda: asked() > 18_999)
        assert asked() == pytest.approx(19_000), "all that was asked for, once"
        assert {sample.hit_rate for sample in rates_seen()} == {0.5}


def test_an_engine_and_its_node_server_know_each_other() -> None:
    with rig() as made:
        greeted(made, "n0", kind="node", incarnation="node-process", models=())
        engine = made.instance(
            "e0", kind="engine", tiers=(), models=(SERVED,), status={"node": "node-process"}
        )
        engine.sync()
        assert shown(made, "e0").node == "n0" and shown(made, "n0").workers == ["e0"]
        assert (shown(made, "e0").state, shown(made, "e0").models) == ("live", ["m"])


def test_breakers_and_full_tiers_are_problems() -> None:
    tiers = (
        tier("host", pinned_bytes=GIB),
        tier("disk", available=False, reason="breaker open"),
    )
    with rig() as made:
        greeted(made, status={"tiers": tiers})
        health = made.get("/v1/health", messages.HealthReply)
        assert health.status == "degraded" and health.problems == [
            "tier host of i0 has no room that is not pinned",
            "tier disk of i0 is not available: breaker open",
        ]
        disk = shown(made).tiers[1]
        assert (disk.available, disk.reason, disk.url) == (False, "breaker open", "file:///disk")


def test_usage_is_by_model_and_tenant_and_shows_no_salt() -> None:
    salted = namespace_of(SERVED, tenant_salt="hush")
    shares = (
        wire.Share(SERVED.tag, 2, 200), wire.Share(salted.tag, 3, 300),
        wire.Share(b"unknown.", 1, 100),
    )  # fmt: skip
    notes = (wire.NamespaceNote(salted.tag, SERVED.tag, tenant_id("hush")),)
    with rig() as made:
        tiers = (tier("host", shares=shares), tier("disk", shares=shares[:1]))
        greeted(made, status={"tiers": tiers}, notes=notes)
        answer = made.client.get("/v1/usage")
        assert "hush" not in answer.text
        rows = msgspec.json.decode(answer.content, type=messages.UsageReply).usage
        assert [(row.tier, row.model, row.tenant_id, row.bytes) for row in rows] == [
            ("host", "m", tenant_id("hush"), 300), ("disk", "m", "", 200),
            ("host", "m", "", 200), ("host", "", "", 100),
        ]  # fmt: skip
        only = made.get("/v1/usage", messages.UsageReply, tier="disk", instance="i0").usage
        assert len(only) == 1
        assert made.client.get("/v1/usage", params={"instance": "no"}).status_code == 404


def test_top_prefixes_of_all_instances() -> None:
    def top(saved: int) -> dict[str, Any]:
        return {"top": (wire.TopPrefix(KEYS[0], saved, 4, 7),)}

    with rig() as made:
        greeted(made, "i0", status=top(10))
        greeted(made, "i1", status=top(20))
        rows = made.get("/v1/prefixes", messages.Prefixes).prefixes
        assert [(row.instance, row.saved_tokens) for row in rows] == [("i1", 20), ("i0", 10)]
        assert (rows[0].model, rows[0].key, rows[0].chunks) == ("m", KEYS[0].hex(), 7)
        assert len(made.get("/v1/prefixes", messages.Prefixes, limit=1).prefixes) == 1


def test_peers_that_have_chunks_in_host() -> None:
    with rig() as made:
        for name in ("i0", "i1", "i2"):
            greeted(made, name, status={"channel": f"tcp://{name}:1"})
        greeted(made, "no channel".replace(" ", "-")).stores("host", KEYS)
        made.instance("i1")
        one = made.instance("i1", incarnation="p0", models=(SERVED,))
        one.greeted = True
        one.stores("host", KEYS[:2])
        two = made.instance("i2", models=(SERVED,))
        two.greeted = True
        two.stores("disk", KEYS)
        asked = wire.WhereRequest(instance="i0", keys=wire.join(KEYS))
        headers = {"content-type": wire.CONTENT_TYPE}
        answer = one.client.post(
            wire.WHERE_PATH, content=msgspec.msgpack.encode(asked), headers=headers
        )
        reply = msgspec.msgpack.decode(answer.content, type=wire.WhereReply)
        named = [reply.peers[n] if n >= 0 else None for n in reply.holder]
        assert named == ["tcp://i1:1", "tcp://i1:1", None, None]
        own = wire.WhereRequest(instance="i1", keys=wire.join(KEYS))
        answer = one.client.post(
            wire.WHERE_PATH, content=msgspec.msgpack.encode(own), headers=headers
        )
        reply = msgspec.msgpack.decode(answer.content, type=wire.WhereReply)
        assert set(reply.holder) == {-1}, "it knows itself what it has"


def test_limits_of_tenants_reach_the_instances_that_know_them() -> None:
    salted = namespace_of(SERVED, tenant_salt="hush")
    notes = (wire.NamespaceNote(salted.tag, SERVED.tag, tenant_id("hush")),)
    with rig() as made:
        instance = greeted(made, notes=notes)
        other = greeted(made, "other")
        assert instance.limits == ()
        put = made.client.put("/v1/quotas", json={"bytes": 500, "tenant": "hush"})
        quota = msgspec.json.decode(put.content, type=messages.Quota)
        assert "hush" not in put.text
        instance.sync()
        other.sync()
        assert instance.limits == (wire.Limit(salted.tag, "*", 500),) and other.limits == ()
        before = instance.limits_version
        instance.sync()
        assert instance.limits_version == before, "told once"
        made.client.put("/v1/quotas", json={"bytes": 9, "tenant_id": tenant_id("hush")})
        instance.sync()
        assert instance.limits == (wire.Limit(salted.tag, "*", 9),)
        assert made.client.delete(f"/v1/quotas/{quota.id}").status_code == 204
        instance.sync()
        assert instance.limits == () and made.get("/v1/quotas") == {"quotas": []}


def test_a_waiting_instance_is_told_at_once() -> None:
    with rig() as made:
        instance = greeted(made)
        start_s = time.monotonic()
        thread = threading.Timer(0.1, lambda: made.post("/v1/clear", {"select": {"all": True}}))
        thread.start()
        (order,) = instance.take(20.0)
        thread.join()
        assert isinstance(order, wire.Clear) and time.monotonic() - start_s < 5


def test_from_pairs_is_the_namespace_itself() -> None:
    namespace = Namespace.of({"a": 1, "b": "two"}).derive(tenant_salt="s")
    assert Namespace.from_pairs(namespace.pairs[::-1]) == namespace
