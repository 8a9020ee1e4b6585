"""Which chunks a request means; whose they are; and what nobody is told."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest
from controller_rig import CHUNK, Rig, keys_of, model, namespace_of, prompt, rig, until

from lmcache_core.agent import wire
from lmcache_core.agent.wire import tenant_id
from lmcache_core.controller import messages

SERVED = model()
TWIN = model(weights="others")
TOKENS = prompt(3)


def note(salt: str = "", served: wire.Model = SERVED, lora: str = "") -> wire.NamespaceNote:
    extra = {"tenant_salt": salt} if salt else {}
    if lora:
        extra["lora"] = lora
    tag = namespace_of(served, **extra).tag
    return wire.NamespaceNote(tag, served.tag, tenant_id(salt or None), lora)


def greeted(made: Rig, name: str = "i0", **fields: Any) -> Any:
    instance = made.instance(name, **{"models": (SERVED,), **fields})
    instance.sync()
    return instance


def looked_up(made: Rig, **select: Any) -> messages.LookupReply:
    found = made.post("/v1/lookup", {"select": select})
    return msgspec.convert(found, messages.LookupReply)


def problem(made: Rig, status: int, path: str = "/v1/clear", **select: Any) -> messages.ErrorBody:
    found = made.post(path, {"select": select}, status=status)
    return msgspec.convert(found, messages.Problem).error


def cleared(made: Rig, instance: Any, **select: Any) -> wire.Clear:
    """The order that a clear of ``select`` gives an instance."""
    made.post("/v1/clear", {"select": select})
    (order,) = instance.take()
    instance.ends(order)
    assert isinstance(order, wire.Clear)
    return order


# Prefixes.


def test_tokens_are_keys_of_whole_chunks() -> None:
    with rig() as made:
        greeted(made)
        found = looked_up(made, tokens=[*TOKENS, 7, 7])
        assert [bytes.fromhex(key) for key in found.keys] == keys_of(SERVED, TOKENS)
        assert (found.chunks, found.prompt_tokens) == (3, 3 * CHUNK + 2)
        assert looked_up(made, tokens=[1]).keys == []


@pytest.mark.parametrize(
    ("select", "extra"),
    [
        ({"tenant": "hush"}, {"tenant_salt": "hush"}),
        ({"tenant": ""}, {}),
        ({"lora": "abcd"}, {"lora": "abcd"}),
        ({"tenant": "hush", "lora": "abcd"}, {"tenant_salt": "hush", "lora": "abcd"}),
    ],
)
def test_a_prefix_is_a_tenants_and_an_adapters(
    select: dict[str, str], extra: dict[str, str]
) -> None:
    keys = keys_of(SERVED, TOKENS, **extra)
    with rig() as made:
        greeted(made).stores("host", keys)
        found = looked_up(made, tokens=TOKENS, **select)
        assert [bytes.fromhex(key) for key in found.keys] == keys
        assert found.instances[0].chunks == 3
        other = looked_up(made, tokens=TOKENS, tenant="another")
        assert other.instances == [], "nobody sees another tenant's without the salt"


def test_every_kind_of_chunk_is_meant_and_the_first_is_counted() -> None:
    served = model(kinds=2)
    first = keys_of(served, TOKENS)
    second = [key[:40] + served.kinds[1].suffix for key in first]
    with rig() as made:
        instance = greeted(made, models=(served,))
        instance.stores("host", first[:2])
        found = looked_up(made, tokens=TOKENS)
        assert (found.chunks, found.instances[0].chunks) == (3, 2)
        order = cleared(made, instance, tokens=TOKENS)
        assert set(wire.split(order.keys or b"")) == {*first, *second}


def test_keys_are_looked_up_as_they_are() -> None:
    keys = keys_of(SERVED, TOKENS)
    with rig() as made:
        greeted(made).stores("disk", keys[:2])
        found = looked_up(made, keys=[key.hex() for key in keys])
        assert (found.chunks, found.model, found.prompt_tokens) == (3, "m", 0)
        assert (found.instances[0].chunks, found.instances[0].tokens) == (2, 2 * CHUNK)


def test_text_goes_through_the_tokenizer_of_an_engine() -> None:
    with rig() as made:
        greeted(made, "a-node", kind="node", models=())
        engine = greeted(made, "engine", kind="engine", tiers=(), status={"tokenizer": True})
        answer: list[Any] = []
        asking = threading.Thread(
            target=lambda: answer.append(looked_up(made, text="once upon", model="m"))
        )
        asking.start()
        until(lambda: engine.sync(wait_s=1.0) and engine.questions)
        (question,) = engine.questions
        assert isinstance(question, wire.Tokenize) and question.text == "once upon"
        engine.sync(answers=(wire.Answer(id=question.id, tokens=TOKENS, found=True),))
        asking.join(10)
        assert answer[0].prompt_tokens == len(TOKENS) and answer[0].chunks == 3


def test_a_tokenizer_that_does_not_answer_is_waited_for_no_longer() -> None:
    with rig(question_timeout_s=0.05) as made:
        assert problem(made, 404, text="x").code == "not_found"
        greeted(made)
        assert problem(made, 409, text="x").code == "no_tokenizer"
        greeted(made, "i1", status={"tokenizer": True})
        late = problem(made, 504, text="x")
        assert late.code == "no_answer" and late.hint


def test_an_answer_that_is_an_error_is_passed_on() -> None:
    with rig() as made:
        engine = greeted(made, status={"tokenizer": True})
        found: list[Any] = []
        asking = threading.Thread(target=lambda: found.append(problem(made, 409, text="x")))
        asking.start()
        until(lambda: engine.sync(wait_s=1.0) and engine.questions)
        engine.sync(answers=(wire.Answer(id=engine.questions[0].id, error="no model"),))
        asking.join(10)
        assert "no model" in found[0].message


# Models.


def test_a_model_need_not_be_named_when_there_is_one() -> None:
    with rig() as made:
        assert "no model was ever served" in problem(made, 404, tokens=TOKENS).hint
        greeted(made)
        assert looked_up(made, tokens=TOKENS).model == "m"
        unknown = problem(made, 404, tokens=TOKENS, model="other")
        assert f"m@{SERVED.tag.hex()}" in unknown.hint


def test_one_of_several_is_named_by_its_identity() -> None:
    with rig() as made:
        greeted(made, "i0")
        greeted(made, "i1", models=(TWIN,))
        for name in ("", "m"):
            several = problem(made, 409, tokens=TOKENS, model=name)
            assert several.code == "ambiguous_model"
            assert TWIN.tag.hex() in several.message and SERVED.tag.hex() in several.message
        found = looked_up(made, tokens=TOKENS, model=f"m@{TWIN.tag.hex()}")
        assert [bytes.fromhex(key) for key in found.keys] == keys_of(TWIN, TOKENS)


def test_the_one_that_is_served_now_is_meant() -> None:
    with rig(lease_s=10) as made:
        greeted(made, "old")
        made.clock.now_s += 11
        greeted(made, "new", models=(TWIN,))
        found = looked_up(made, tokens=TOKENS, model="m")
        assert [bytes.fromhex(key) for key in found.keys] == keys_of(TWIN, TOKENS)


# Everything of a model, of a tenant.


def test_everything_of_a_model_or_tenant_is_namespaces() -> None:
    other = model("other")
    notes = (note("a"), note("b"), note("a", lora="ad"), note("a", other), note())
    with rig() as made:
        instance = greeted(made, models=(SERVED, other), notes=notes)

        def tags(**select: Any) -> set[bytes]:
            order = cleared(made, instance, **select)
            assert order.keys is None and order.tags is not None
            return set(order.tags)

        a, b, a_lora, a_other, plain = (each.tag for each in notes)
        assert tags(model="m") == {a, b, a_lora, plain}
        assert tags(tenant="a") == {a, a_lora, a_other}
        assert tags(tenant_id=tenant_id("a")) == {a, a_lora, a_other}
        assert tags(tenant="a", model="other") == {a_other}
        assert tags(tenant="") == {plain, other.tag}
        assert tags(model="other", tenant="") == {other.tag}
        everything = cleared(made, instance, all=True)
        assert everything.tags is None and everything.keys is None


def test_names_outlive_everything(tmp_path: Any) -> None:
    from lmcache_core.controller.state_sqlite import SqliteState

    path = str(tmp_path / "state")
    with rig(SqliteState(path)) as made:
        greeted(made, notes=(note("a"),))
    with rig(SqliteState(path)) as made:
        instance = greeted(made, "another", models=())
        order = cleared(made, instance, tenant="a")
        assert order.tags == (note("a").tag,)
        assert cleared(made, instance, model="m").tags is not None


# What means nothing.

KEY = keys_of(SERVED, TOKENS)[0].hex()


@pytest.mark.parametrize(
    "select",
    [
        {},
        {"tokens": [1], "text": "x"},
        {"tokens": [1], "all": True},
        {"text": "x", "keys": [KEY]},
        {"keys": [KEY], "model": "m"},
        {"keys": [KEY], "tenant": "a"},
        {"all": True, "model": "m"},
        {"all": True, "tenant": ""},
        {"model": "m", "lora": "a"},
        {"tenant": "a", "tenant_id": "0" * 16},
        {"tokens": TOKENS, "tenant_id": "0" * 16},
        {"tokens": []},
        {"tokens": [-1]},
        {"tokens": [1 << 32]},
        {"tokens": [1.5]},
        {"keys": ["00"]},
        {"keys": [KEY.upper()]},
        {"unknown": 1},
    ],
)
def test_what_selects_nothing_or_in_two_ways_is_refused(select: dict[str, Any]) -> None:
    with rig() as made:
        greeted(made)
        assert problem(made, 422, **select).message
        assert made.get("/v1/jobs") == {"jobs": []}


def test_a_lookup_is_of_a_prefix() -> None:
    with rig() as made:
        greeted(made)
        problem(made, 422, "/v1/lookup", all=True)
        problem(made, 422, "/v1/lookup", model="m")


def test_of_whom_nothing_is_known() -> None:
    with rig() as made:
        greeted(made)
        unknown = problem(made, 404, tenant="who")
        assert "who" not in unknown.message
        assert problem(made, 404, model="no").code == "not_found"


def test_a_prefix_of_too_many_chunks_is_refused() -> None:
    tiny = msgspec.structs.replace(model("tiny"), chunk_size=1)
    with rig() as made:
        greeted(made, models=(tiny,))
        assert problem(made, 422, tokens=[1] * 65_537).code == "too_many_chunks"
        assert looked_up(made, tokens=[1] * 65_536).chunks == 65_536
