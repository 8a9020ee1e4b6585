"""C: many keys in one call."""

from __future__ import annotations

import time

from lmcache_conformance.frame import NotClaimed, Wrong, check
from lmcache_conformance.memory import Memory, value
from lmcache_conformance.rig import Rig, names, within
from lmcache_core.sdk import Buffer, ContractViolation, GetResult, Status

_OPS = ("exists", "get_into", "put_from", "delete")


def _call(rig: Rig, op: str, keys: list[bytes], memory: Memory, seconds: float = 10) -> object:
    method = getattr(rig.store, op)
    if op in ("get_into", "put_from"):
        return method(keys, memory.buffers(read_only=op == "put_from"), within(seconds))
    return method(keys, within(seconds))


@check("C1", fix="keep the order of keys; one answer a key, also when some are absent")
def order_and_mixed_answers(rig: Rig) -> None:
    """Answers keep the order of the keys; a miss does not disturb its neighbours."""
    keys, size = rig.keys(8), rig.size()
    contents = {key: value(i, size + i * rig.claims.alignment) for i, key in enumerate(keys)}
    rig.must_put({key: contents[key] for key in keys[::2]})
    for asked in (keys, keys[::-1], tuple(keys)):
        want = [Status.OK if key in keys[::2] else Status.MISS for key in asked]
        answers = rig.store.exists(asked, within(10))
        rig.expect_answers(answers, len(asked), Status, "exists")
        rig.expect(answers == want, f"exists gave {names(answers)} in another order")
        memory = Memory([len(contents[key]) for key in asked])
        results = rig.store.get_into(asked, memory.buffers(), within(10))
        rig.expect_answers(results, len(asked), GetResult, "get_into")
        rig.expect([r.status for r in results] == want, "get_into's answers are in another order")
        for index, key in enumerate(asked):
            if want[index] is Status.OK:
                found = memory.bytes_of(index)
                rig.expect(found == contents[key], "get_into filled another key's target")
        rig.expect(memory.canaries_intact(), "get_into wrote between its targets")
    answers = rig.store.delete(keys, within(10))
    rig.expect(answers == [Status.OK] * len(keys), f"delete of a batch gave {names(answers)}")


@check("C2", fix="an empty batch is no error: return []")
def empty_batch(rig: Rig) -> None:
    """An empty batch gives an empty list."""
    for op in _OPS:
        answer = _call(rig, op, [], Memory([]))
        rig.expect(answer == [], f"{op} of no keys gave {answer!r}")


@check("C3", fix="max_batch is what one call must take; lower the claim if it does not")
def max_batch_works(rig: Rig) -> None:
    """A call with exactly max_batch keys works, in every operation."""
    count = min(rig.claims.max_batch, 1024)
    size = rig.size(512)
    contents = {key: value(i, size) for i, key in enumerate(rig.keys(count))}
    keys = list(contents)
    rig.must_put(contents)
    memory = Memory([size] * count)
    results = rig.store.get_into(keys, memory.buffers(), within(10))
    rig.expect(
        results == [GetResult(Status.OK, size)] * count, "get_into of max_batch keys was not OK"
    )
    rig.expect(
        all(memory.bytes_of(i) == contents[key] for i, key in enumerate(keys)),
        "get_into of max_batch keys gave another key's bytes",
    )
    for op, due in (("exists", Status.OK), ("delete", Status.OK), ("exists", Status.MISS)):
        answers = getattr(rig.store, op)(keys, within(10))
        rig.expect(answers == [due] * count, f"{op} of max_batch keys gave {names(answers)}")


@check("C4", fix="check len(keys) before anything else; BatchLoop.check_call does")
def over_max_batch(rig: Rig) -> None:
    """Over max_batch is a ContractViolation in every operation, and nothing is touched."""
    count = rig.claims.max_batch + 1
    if count > 1 << 16:
        raise NotClaimed(f"max_batch is {count - 1}, more than core ever sends")
    size = rig.claims.alignment
    keys = rig.keys(count)
    there, content = keys[0], value(rig.seed, size)
    rig.must_put({there: content})
    for op in _OPS:
        memory = Memory([size] * count)
        try:
            _call(rig, op, keys, memory)
        except ContractViolation:
            rig.expect(memory.untouched(), f"{op} over max_batch touched its buffers")
        else:
            raise Wrong(f"{op} took {count} keys, max_batch is {count - 1}")
    rig.expect_value(there, content, "after calls over max_batch")
    rig.expect_absent(keys[1], "after a put over max_batch")


@check("C5", fix="sort the targets by address and compare neighbours; BatchLoop.check_call does")
def overlapping_targets(rig: Rig) -> None:
    """Overlapping targets are a ContractViolation and nothing is touched."""
    if rig.claims.max_batch < 2:
        raise NotClaimed("max_batch is 1")
    size, step = rig.size(), rig.claims.alignment
    keys = rig.keys(2)
    rig.must_put({key: value(i, size) for i, key in enumerate(keys)})
    memory = Memory([2 * size])
    whole = memory.buffers()[0]
    assert whole.view is not None
    for start in (0, step, size - step):
        later = Buffer(whole.view[start : start + size], whole.address + start, size)
        first = Buffer(whole.view[:size], whole.address, size)
        for pair in ([first, later], [later, first]):
            try:
                rig.store.get_into(keys, pair, within(5))
            except ContractViolation:
                rig.expect(memory.untouched(), "overlapping targets were written to")
            else:
                raise Wrong(f"get_into took targets that overlap by {size - start} bytes")


@check("C6", fix="decide each key by itself; an exception is for the whole call only")
def one_bad_key_leaves_the_rest(rig: Rig) -> None:
    """A key that misses, or whose target is too small, does not change its neighbours' answers."""
    if rig.claims.max_batch < 4:
        raise NotClaimed("max_batch is below 4")
    size, step = rig.size(2 * 4096), rig.claims.alignment
    keys = rig.keys(4)
    contents = {key: value(i, size) for i, key in enumerate(keys)}
    rig.must_put({key: contents[key] for key in keys[:3]})
    asked = [keys[0], keys[1], keys[3], keys[2]]
    memory = Memory([size, step, size, size])
    results = rig.store.get_into(asked, memory.buffers(), within(10))
    due = [Status.OK, Status.SIZE_MISMATCH, Status.MISS, Status.OK]
    rig.expect_answers(results, 4, GetResult, "get_into")
    found = [each.status for each in results]
    rig.expect(found == due, f"answers were {found}, due are {due}")
    rig.expect(memory.bytes_of(0) == contents[keys[0]], "the key before a bad one is wrong")
    rig.expect(memory.bytes_of(3) == contents[keys[2]], "the key after a bad one is wrong")
    rig.expect(memory.canaries_intact(), "get_into wrote outside of its targets")


@check("C7", fix="look at ctx before each key; answer TIMED_OUT for what was not started")
def deadline_in_the_past(rig: Rig) -> None:
    """A deadline never raises: past it every key is TIMED_OUT, at once, and stays whole."""
    keys, size = rig.keys(3), rig.size()
    contents = {key: value(i, size) for i, key in enumerate(keys)}
    rig.must_put(contents)
    for op in _OPS:
        source = Memory.of(list(contents.values()))
        started_s = time.monotonic()
        try:
            answers = _call(rig, op, keys, source, seconds=-1)
        except Exception as error:
            raise Wrong(f"{op} with a deadline in the past raised {error!r}") from error
        kind = GetResult if op == "get_into" else Status
        rig.expect_answers(answers, 3, kind, op)
        assert isinstance(answers, list)
        statuses = [each.status if isinstance(each, GetResult) else each for each in answers]
        rig.expect(
            statuses == [Status.TIMED_OUT] * 3,
            f"{op} with a deadline in the past answered {names(statuses)}",
        )
        seconds = time.monotonic() - started_s
        rig.expect(seconds < 0.5, f"{op} with a deadline in the past took {seconds:.2f} s")
    for key, content in contents.items():
        rig.expect_one_of(key, [content, None], size, "after calls past their deadline")
