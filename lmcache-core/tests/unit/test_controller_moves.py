"""Moving, copying and encoding chunks: nothing is dropped that nobody confirmed."""

from __future__ import annotations

import pytest
from controller_ops import (
    KEYS,
    SELECT,
    SERVED,
    TOKENS,
    ask,
    greeted,
    place,
    until_ended,
)
from controller_rig import (
    keys_of,
    namespace_of,
    prompt,
    rig,
    tier,
)

from lmcache_core.agent import wire
from lmcache_core.agent.wire import tenant_id
from lmcache_core.controller.actions import SLICE_KEYS

# Move and copy.


def test_a_move_within_an_instance_clears_what_was_confirmed() -> None:
    with rig() as made:
        instance = greeted(made)
        instance.stores("disk", KEYS)
        job = ask(made, "move", source=place("i0", "disk"), target=place("i0", "host"))
        (copy,) = instance.take()
        assert isinstance(copy, wire.Copy) and (copy.source, copy.target) == ("disk", "host")
        assert wire.split(copy.keys) == KEYS and copy.kinds == SERVED.kinds and copy.chained
        assert copy.peer == ""
        instance.ends(copy, held=wire.join(KEYS[:2]), total=3, settled=3, errors={"no_room": 1})
        (clear,) = instance.take()
        assert isinstance(clear, wire.Clear) and clear.tiers == ("disk",)
        assert wire.split(clear.keys or b"") == KEYS[:2], "what was not confirmed stays"
        instance.ends(clear)
        shown = made.job(job.id)
        assert (shown.state, shown.errors) == ("done", {"no_room": 1})
        assert [part.op for part in shown.parts] == ["copy", "clear"]


def test_a_move_to_another_instance() -> None:
    with rig() as made:
        giver, taker = greeted(made, "giver"), greeted(made, "taker")
        giver.stores("disk", KEYS)
        job = ask(made, "move", source=place("giver", "disk"), target=place("taker", "disk"))
        (hold,) = giver.take()
        assert isinstance(hold, wire.Copy) and (hold.source, hold.target) == ("disk", "host")
        assert hold.pin == f"job:{job.id}:0" and hold.chained
        assert taker.take(0.0) == []
        giver.ends(hold, held=wire.join(KEYS[:2]), total=3)
        (take,) = taker.take()
        assert isinstance(take, wire.Copy) and (take.target, take.peer) == ("disk", "tcp://giver:1")
        assert wire.split(take.keys) == KEYS[:2] and take.pin == ""
        assert not take.chained, "one of them is missing"
        taker.ends(take, held=wire.join(KEYS[1:2]))
        (drop,) = giver.take()
        assert isinstance(drop, wire.Clear) and drop.tiers == ("disk",)
        assert wire.split(drop.keys or b"") == KEYS[1:2]
        giver.ends(drop)
        (release,) = giver.take()
        assert isinstance(release, wire.Unpin) and release.pin == hold.pin
        giver.ends(release)
        assert made.job(job.id).state == "done"


def test_a_copy_to_another_instance_drops_nothing() -> None:
    with rig() as made:
        giver, taker = greeted(made, "giver"), greeted(made, "taker")
        giver.stores("host", KEYS)
        job = ask(made, "copy", source=place("giver", "host"), target=place("taker", "host"))
        shown = until_ended(made, job.id, giver, taker)
        assert shown.state == "done"
        assert [part.op for part in shown.parts] == ["copy", "copy", "unpin"]
        assert giver.held["host"] == taker.held["host"] == set(KEYS)
        found = made.post("/v1/lookup", {"select": SELECT})["instances"]
        assert [row["chunks"] for row in found] == [3, 3]


def test_a_failed_transfer_drops_nothing_and_lets_go() -> None:
    with rig() as made:
        giver, taker = greeted(made, "giver"), greeted(made, "taker")
        giver.stores("host", KEYS)
        job = ask(made, "move", source=place("giver", "host"), target=place("taker", "host"))
        giver.obey()
        (take,) = taker.take()
        taker.ends(take, "failed", error="the peer is away")
        (release,) = giver.take()
        assert isinstance(release, wire.Unpin)
        giver.ends(release)
        shown = made.job(job.id)
        assert (shown.state, shown.error) == ("failed", "taker: the peer is away")
        assert giver.held["host"] == set(KEYS)


def test_much_is_moved_in_slices_one_after_the_other() -> None:
    keys = [SERVED.tag + n.to_bytes(32, "big") + bytes(6) for n in range(2 * SLICE_KEYS + 1)]
    with rig() as made:
        giver, taker = greeted(made, "giver"), greeted(made, "taker")
        giver.stores("disk", keys)
        job = ask(
            made, "move", select={"model": "m"},
            source=place("giver", "disk"), target=place("taker", "host"),
        )  # fmt: skip
        assert len(job.parts) == 12
        (hold,) = giver.take()
        giver.orders = [hold]
        assert isinstance(hold, wire.Copy) and len(wire.split(hold.keys)) == SLICE_KEYS
        shown = until_ended(made, job.id, giver, taker)
        assert shown.state == "done"
        assert taker.held["host"] == set(keys) and giver.held["disk"] == set()


def test_only_what_the_source_has_is_moved() -> None:
    salted = namespace_of(SERVED, tenant_salt="a")
    note = wire.NamespaceNote(salted.tag, SERVED.tag, tenant_id("a"))
    theirs = keys_of(SERVED, TOKENS, tenant_salt="a")
    with rig() as made:
        instance = greeted(made, notes=(note,))
        instance.stores("host", [*KEYS[:2], *theirs])
        ask(made, "copy", source=place("i0", "host"), target=place("i0", "disk"))
        (order,) = instance.take()
        assert isinstance(order, wire.Copy) and wire.split(order.keys) == KEYS[:2]
        assert not order.chained
        ask(
            made, "copy", select={"tenant": "a"},
            source=place("i0", "host"), target=place("i0", "disk"),
        )  # fmt: skip
        (order,) = instance.take()
        assert isinstance(order, wire.Copy) and wire.split(order.keys) == sorted(theirs)
        nothing = ask(made, "copy", source=place("i0", "disk"), target=place("i0", "host"))
        assert nothing.state == "done" and nothing.parts == []


@pytest.mark.parametrize(
    ("source", "target", "status", "said"),
    [
        (place("no", "host"), place("i0", "host"), 404, "'no'"),
        (place("i0", "host"), place("i0", "tape"), 404, "'tape'"),
        (place("i0", "host"), place("i0", "host"), 422, "same tier"),
        (place("i0", "host"), place("i0", "read-only"), 409, "not written"),
        (place("i0", "host"), place("alone", "host"), 409, "no channel"),
        (place("alone", "host"), place("i0", "host"), 409, "no channel"),
        (place("engine", "host"), place("i0", "host"), 409, "holds no chunks"),
        (place("gone", "host"), place("i0", "host"), 409, "is lost"),
    ],
)
def test_a_move_that_can_not_be_is_refused(
    source: dict[str, str], target: dict[str, str], status: int, said: str
) -> None:
    tiers = ("host", "disk", "read-only")
    told = tuple(tier(name, writable=name != "read-only") for name in tiers)
    with rig(lease_s=10) as made:
        greeted(made, "gone")
        made.clock.now_s += 11
        greeted(made, tiers=tiers, status={"tiers": told, "channel": "tcp://i0:1"})
        greeted(made, "alone", status={})
        greeted(made, "engine", kind="engine", tiers=(), status={})
        problem = ask(made, "move", status=status, source=source, target=target)
        assert said in problem.message and problem.code
        assert made.get("/v1/jobs")["jobs"] == []


def test_chunks_of_an_unknown_model_are_not_moved() -> None:
    with rig() as made:
        greeted(made)
        problem = ask(
            made, "copy", status=409, select={"keys": ["00" * 46]},
            source=place("i0", "host"), target=place("i0", "disk"),
        )  # fmt: skip
        assert problem.code == "unknown_model"


def test_one_that_holds_what_it_was_not_to_is_refused() -> None:
    with rig() as made:
        instance, other = greeted(made), greeted(made, "other")
        instance.stores("disk", KEYS)
        job = ask(made, "move", source=place("i0", "disk"), target=place("i0", "host"))
        (copy,) = instance.take()
        strangers = keys_of(SERVED, prompt(1, start=9000))
        for liar, held in ((instance, wire.join(strangers)), (instance, b"x"), (other, b"")):
            said = wire.Progress(id=copy.id, state="done", held=held)
            answer = liar.post(
                wire.Sync(
                    version=1, instance=liar.name, incarnation="p0", kind="embedded",
                    seq=liar.seq, progress=(said,),
                )
            )  # fmt: skip
            assert answer.status_code == 400, answer.text
        assert made.job(job.id).parts[0].state == "waiting"


# Compress.


def test_chunks_are_compressed_where_they_are() -> None:
    with rig() as made:
        instance = greeted(made)
        greeted(made, "other", tiers=("host",))
        job = ask(made, "compress", tier="disk", codec="zstd", level="3")
        assert [part.instance for part in job.parts] == ["i0"]
        (order,) = instance.take()
        assert isinstance(order, wire.Recode)
        assert (order.tier, order.codec, order.level) == ("disk", "zstd", "3")
        assert wire.split(order.keys or b"") == KEYS and order.kinds == SERVED.kinds
        instance.ends(order, notes={"before_bytes": 100, "after_bytes": 40})
        assert made.job(job.id).parts[0].notes == {"before_bytes": 100, "after_bytes": 40}
        ask(made, "decompress", tier="disk", select={"model": "m"})
        (order,) = instance.take()
        assert isinstance(order, wire.Recode) and order.codec == ""
        assert order.keys is None and order.tags == (SERVED.tag,)


def test_compressing_needs_a_codec_and_a_tier() -> None:
    with rig() as made:
        greeted(made)
        assert ask(made, "compress", status=422, tier="disk").code == "no_codec"
        assert ask(made, "decompress", status=422, tier="disk", codec="zstd").code == "bad_codec"
        assert ask(made, "compress", status=404, tier="tape", codec="zstd").message
        ask(made, "compress", status=404, tier="disk", codec="zstd", instances=["no"])
