"""What instances say: gaps, snapshots, successors, lies, and what becomes of the silent."""

from __future__ import annotations

import socket
import threading
from typing import Any

import msgspec
import pytest
from controller_rig import TOKEN, Rig, keys_of, model, namespace_of, prompt, rig, tier, until

from lmcache_core.agent import wire
from lmcache_core.controller import messages

SERVED = model()
TOKENS = prompt(4)
KEYS = keys_of(SERVED, TOKENS)


def greeted(made: Rig, name: str = "i0", **fields: Any) -> Any:
    instance = made.instance(name, **{"models": (SERVED,), **fields})
    assert not instance.sync().resync
    return instance


def held(made: Rig, name: str = "i0") -> int:
    """Chunks of the prefix that an instance has, as the controller knows."""
    found = made.post("/v1/lookup", {"select": {"tokens": TOKENS, "model": "m"}})["instances"]
    return next((row["chunks"] for row in found if row["instance"] == name), 0)


def shown(made: Rig, name: str = "i0") -> messages.Instance:
    found: messages.Instance = made.get(f"/v1/instances/{name}", messages.Instance)
    return found


def refused(instance: Any, code: int, /, **fields: Any) -> messages.ErrorBody:
    """How one bad sync is refused."""
    given = {
        "version": wire.VERSION, "instance": instance.name, "incarnation": instance.incarnation,
        "kind": instance.kind, "seq": instance.seq, **fields,
    }  # fmt: skip
    answer = instance.post(wire.Sync(**given))
    assert answer.status_code == code, answer.text
    return msgspec.json.decode(answer.content, type=messages.Problem).error


# What it holds.


def test_one_that_is_unknown_is_asked_to_say_all() -> None:
    with rig() as made:
        instance = made.instance()
        instance.greeted = True
        assert instance.sync(seq=7).resync
        instance.greeted = False
        assert not instance.sync().resync


def test_changes_are_followed() -> None:
    with rig() as made:
        instance = greeted(made)
        instance.stores("host", KEYS[:3])
        assert held(made) == 3
        instance.stores("disk", KEYS[1:2])
        instance.stores("host", KEYS[1:3], present=False)
        assert held(made) == 2, "the second is on disk still"
        tiers = {tier.name: tier.chunks for tier in shown(made).tiers}
        assert tiers == {"host": 1, "disk": 1}


def test_a_gap_is_noticed_and_all_is_said_again() -> None:
    with rig() as made:
        instance = greeted(made)
        instance.stores("host", KEYS[:1])
        instance.seq += 1
        assert instance.stores("host", KEYS[1:2]).resync
        assert shown(made).state == "resyncing"
        assert instance.stores("host", KEYS[2:3]).resync, "until it does"
        instance.greeted = False
        assert not instance.sync().resync
        assert held(made) == 3 and shown(made).state == "live"


def test_what_is_told_twice_counts_once() -> None:
    with rig() as made:
        instance = greeted(made)
        came = wire.Change(0, True, wire.join(KEYS[:2]))
        went = wire.Change(0, False, wire.join(KEYS[1:2]))
        instance.sync(changes=(came,), seq=1)
        assert not instance.sync(changes=(came, went), seq=1).resync, "its answer was lost"
        assert held(made) == 1
        assert not instance.sync(changes=(), seq=3).resync


def test_a_snapshot_comes_in_pieces() -> None:
    with rig() as made:
        instance = greeted(made)
        instance.stores("host", KEYS)
        instance.sync(
            reset=True, more=True, seq=1, changes=(wire.Change(0, True, wire.join(KEYS[:1])),)
        )
        assert shown(made).state == "resyncing" and held(made) == 1
        instance.sync(more=True, changes=(wire.Change(0, True, wire.join(KEYS[1:2])),))
        assert not instance.sync(changes=(wire.Change(1, True, wire.join(KEYS[2:3])),)).resync
        assert held(made) == 3 and shown(made).state == "live"


def test_a_gap_within_a_snapshot_is_noticed() -> None:
    with rig() as made:
        instance = greeted(made)
        instance.sync(reset=True, more=True, seq=1, changes=())
        assert instance.sync(seq=9, changes=(wire.Change(0, True, KEYS[0]),)).resync
        assert held(made) == 0


def test_too_much_is_refused_and_said_and_costs_nobody_else() -> None:
    with rig(max_chunks_per_instance=3, max_chunks=5) as made:
        greeted(made, "other").stores("host", KEYS[:2])
        instance = greeted(made)
        instance.stores("host", KEYS[:3])
        change = wire.Change(0, True, KEYS[3])
        problem = refused(instance, 413, changes=(change,))
        assert problem.code == "too_many_chunks" and "--max-chunks-per-instance" in problem.hint
        assert held(made) == 0 and held(made, "other") == 2
        health = made.get("/v1/health", messages.HealthReply)
        assert health.problems == ["instance 'i0' is not in the directory: "
                                   "more than 3 chunks of one instance"]  # fmt: skip
        instance.held["host"] = set(KEYS[:3])
        instance.greeted = False
        instance.sync()
        assert held(made) == 3
        assert made.get("/v1/health", messages.HealthReply).problems == []


# Who speaks.


def test_a_name_is_one_process_until_that_is_silent() -> None:
    with rig() as made:
        instance = greeted(made)
        instance.stores("host", KEYS)
        other = made.instance(models=(SERVED,), incarnation="p1")
        problem = refused(other, 409, reset=True, status=other.says())
        assert problem.code == "name_taken" and problem.hint
        assert held(made) == 4, "what the first has is as it was"
        made.clock.now_s += 2.5
        other.sync()
        assert held(made) == 0 and shown(made).incarnation == "p1"
        assert refused(instance, 409).code == "name_taken", "the older one can't come back"
        other.stores("host", KEYS[:1])
        assert held(made) == 1


def test_one_that_waits_long_is_not_silent() -> None:
    with rig() as made:
        instance = greeted(made)
        instance.sync(wait_s=0.05)
        made.clock.now_s += 20
        thread = threading.Thread(target=lambda: instance.sync(wait_s=30.0))
        thread.start()
        until(lambda: made.controller.registry.records["i0"].gap_s == 30)
        made.clock.now_s += 25
        other = made.instance(models=(SERVED,), incarnation="p1")
        refused(other, 409, reset=True, status=other.says())
        made.post("/v1/clear", {"select": {"all": True}})
        thread.join(10)
        assert not thread.is_alive()


def test_the_silent_are_lost_and_then_forgotten() -> None:
    with rig(lease_s=10, forget_s=100) as made:
        instance = greeted(made)
        instance.stores("host", KEYS)
        made.clock.now_s += 11
        assert shown(made).state == "lost" and held(made) == 0
        health = made.get("/v1/health", messages.HealthReply)
        assert (health.status, health.problems) == ("degraded", ["instance i0 is lost"])
        instance.sync()
        assert shown(made).state == "live" and held(made) == 4, "it has missed nothing"
        made.clock.now_s += 101
        until(lambda: made.client.get("/v1/instances/i0").status_code == 404)
        health = made.get("/v1/health", messages.HealthReply)
        assert (health.status, health.chunks) == ("ok", 0)


def test_there_are_so_many_instances_and_no_more() -> None:
    with rig(max_instances=2) as made:
        greeted(made, "i0")
        greeted(made, "i1")
        other = made.instance("i2")
        problem = refused(other, 409, reset=True)
        assert problem.code == "too_many_instances" and "--max-instances" in problem.hint


def test_an_instance_that_waits_costs_no_turn_and_is_answered_by_its_next_sync() -> None:
    with rig() as made:
        instance = greeted(made)
        done = threading.Event()

        def wait() -> None:
            other = made.instance(models=(SERVED,))
            other.greeted = True
            other.sync(wait_s=30.0)
            done.set()

        turn = made.controller.registry.records["i0"].turn
        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: made.controller.registry.records["i0"].turn > turn)
        assert not done.is_set()
        instance.sync()
        thread.join(10)
        assert done.is_set()


def test_one_that_hung_up_is_waited_for_no_longer() -> None:
    with rig() as made:
        greeted(made)
        body = msgspec.msgpack.encode(
            wire.Sync(
                version=1, instance="i0", incarnation="p0", kind="embedded", seq=1, wait_s=30.0
            )
        )
        host, port = made.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(
                b"POST /v1/sync HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/msgpack"
                b"\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s"
                % (TOKEN.encode(), len(body), body)
            )
            until(lambda: _in_flight(made) == 2)
        until(lambda: _in_flight(made) == 1)


def _in_flight(made: Rig) -> int:
    """Requests now, with the one that asks."""
    text = made.client.get("/metrics").text
    line = next(line for line in text.splitlines() if "in_flight " in line and line[0] != "#")
    return int(line.split()[-1])


# What can't be.

BAD: list[tuple[int, dict[str, Any]]] = [
    (400, {"changes": (wire.Change(0, True, b"x" * 45),)}),
    (400, {"changes": (wire.Change(5, True, KEYS[0]),)}),
    (400, {"kind": "engine", "changes": (wire.Change(0, True, KEYS[0]),)}),
    (400, {"kind": "node"}),
    (409, {"version": 2}),
    (400, {"models": (msgspec.structs.replace(SERVED, tag=b"\0" * 8),)}),
    (400, {"models": (msgspec.structs.replace(SERVED, pairs=SERVED.pairs * 2),)}),
    (400, {"status": wire.Status("1", 1, 1.0, tiers=(tier("host"), tier("host")))}),
]


@pytest.mark.parametrize(("code", "fields"), BAD)
def test_a_lie_is_refused_and_changes_nothing_of_others(code: int, fields: dict[str, Any]) -> None:
    with rig() as made:
        greeted(made, "other").stores("host", KEYS)
        before = shown(made, "other")
        instance = greeted(made)
        instance.stores("host", KEYS[:1])
        assert refused(instance, code, **fields).message
        assert shown(made, "other") == before and held(made, "other") == 4
        assert held(made) == 1, "nor of its own"
        assert not instance.stores("host", KEYS[1:2]).resync


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"\xc1", 400),
        (msgspec.msgpack.encode([1, 2]), 422),
        (msgspec.msgpack.encode({"version": 1}), 422),
        (b"\x91" * 100_000, 422),
    ],
)
def test_what_is_no_sync_is_refused(body: bytes, status: int) -> None:
    with rig() as made:
        headers = {"content-type": wire.CONTENT_TYPE}
        answer = made.client.post(wire.PATH, content=body, headers=headers)
        assert answer.status_code == status, answer.text
        assert msgspec.json.decode(answer.content, type=messages.Problem).error.code


def test_names_that_there_is_no_room_for_cost_the_instance_nothing() -> None:
    """With a salt for each user there are more of them than anybody keeps."""
    with rig(max_namespaces_per_instance=2, max_namespaces=3) as made:
        notes = [
            wire.NamespaceNote(
                namespace_of(SERVED, tenant_salt=f"{n}").tag, SERVED.tag, wire.tenant_id(f"{n}")
            )
            for n in range(4)
        ]
        clear = {"select": {"tenant": "0"}}
        greeted(made, "i0", notes=tuple(notes[:3]))
        assert made.client.post("/v1/clear", json=clear).status_code == 202
        assert not made.get("/v1/health")["problems"]
        greeted(made, "i1", notes=tuple(notes[3:]), held={"host": set(KEYS), "disk": set()})
        assert held(made, "i1") == len(KEYS), "what it holds is known"
        assert "--max-namespaces" in "".join(made.get("/v1/health")["problems"])
        answer = made.client.post("/v1/clear", json=clear)
        problem = msgspec.json.decode(answer.content, type=messages.Problem).error
        assert answer.status_code == 409 and problem.code == "names_incomplete"
        assert "--max-namespaces" in problem.hint
        assert made.client.post("/v1/clear", json={"select": {"all": True}}).status_code == 202
        text = made.client.get("/metrics").text
        assert 'lmcache_core:controller_names_dropped_total{kind="namespace"} 1' in text


def test_of_an_instance_the_latest_namespaces_get_quotas() -> None:
    with rig(max_namespaces_per_instance=2) as made:
        notes = [
            wire.NamespaceNote(
                namespace_of(SERVED, tenant_salt=f"{n}").tag, SERVED.tag, wire.tenant_id(f"{n}")
            )
            for n in range(3)
        ]
        instance = greeted(made, "i0", notes=tuple(notes))
        for n in range(3):
            quota = {"tenant": f"{n}", "tier": "host", "bytes": 1 << 20}
            assert made.client.put("/v1/quotas", json=quota).is_success
        limits = instance.sync().limits
        assert limits is not None and {limit.tag for limit in limits} == {n.tag for n in notes[1:]}


def test_limits_are_worked_out_when_something_changed_and_not_in_each_sync(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with rig() as made:
        note = wire.NamespaceNote(
            namespace_of(SERVED, tenant_salt="a").tag, SERVED.tag, wire.tenant_id("a")
        )
        instance = greeted(made, "i0", notes=(note,))
        looked: list[bytes] = []
        find = made.controller.names.note

        def counted(tag: bytes) -> wire.NamespaceNote | None:
            looked.append(tag)
            return find(tag)

        monkeypatch.setattr(made.controller.names, "note", counted)
        for nbytes in (1 << 20, 2 << 20):
            quota = {"tenant": "a", "tier": "host", "bytes": nbytes}
            assert made.client.put("/v1/quotas", json=quota).is_success
            looked.clear()
            for _ in range(5):
                instance.sync()
            assert instance.limits == (wire.Limit(note.tag, "host", nbytes),)
            assert looked == [note.tag]
        assert made.client.delete(f"/v1/quotas/{wire.tenant_id('a')}.host").is_success
        instance.sync()
        assert instance.limits == ()
