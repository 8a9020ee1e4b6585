"""K: any sequence of operations answers like a dictionary."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from lmcache_conformance.checks.faults import behind_a_proxy
from lmcache_conformance.frame import Profile, check
from lmcache_conformance.memory import value
from lmcache_conformance.rig import Rig, within
from lmcache_core.sdk import BackendUnavailable, OnExisting, Status

_OPS = ("put", "get", "exists", "delete", "put_many", "get_many")


@check("K1", limit_s=300, fix="run the printed steps by hand: each is one call")
def like_a_dictionary(rig: Rig) -> None:
    """Any sequence of puts, gets, exists and deletes, alone and in batches, answers like a
    dictionary."""
    sizes = [rig.size(n) for n in (1, 4096, 8192, 70_000)]
    keeps = rig.claims.on_existing is OnExisting.KEEP
    steps = st.lists(
        st.tuples(
            st.sampled_from(_OPS),
            st.integers(0, 3),
            st.integers(0, len(sizes) - 1),
            st.integers(0, 9),
        ),
        min_size=1,
        max_size=25,
    )
    runs = iter(range(1 << 30))

    @seed(rig.seed)
    @settings(
        max_examples=300 if rig.full else 40,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(steps)
    def follow(sequence: list[tuple[str, int, int, int]]) -> None:
        run = next(runs)
        model: dict[bytes, bytes] = {}
        done: list[str] = []
        for op, number, size, what in sequence:
            key = rig.key(f"{run}-{number}")
            done.append(f"{op}(k{number}, {sizes[size]} bytes of {what})")
            said = " then ".join(done)
            if op.startswith("put"):
                items = {key: value(what, sizes[size])}
                if op == "put_many" and rig.claims.max_batch > 1:
                    items[rig.key(f"{run}-{(number + 1) % 4}")] = value(what + 1, sizes[size])
                rig.must_put(items)
                for each, content in items.items():
                    if not (keeps and each in model):
                        model[each] = content
            elif op == "delete":
                rig.expect(rig.store.delete([key], within(10)) == [Status.OK], said)
                model.pop(key, None)
            elif op == "exists":
                due = Status.OK if key in model else Status.MISS
                rig.expect(rig.store.exists([key], within(10)) == [due], f"{said}: due {due.name}")
            else:
                numbers = range(4) if op == "get_many" else [number]
                for one in numbers:
                    name = rig.key(f"{run}-{one}")
                    if name in model:
                        rig.expect_value(name, model[name], said)
                    else:
                        rig.expect_absent(name, said)

    follow()


@check(
    "K2",
    limit_s=300,
    profile=Profile.RESILIENT,
    fix="an answer other than OK leaves the key in doubt, but whole: publish in one step",
)
def like_a_dictionary_under_faults(rig: Rig) -> None:
    """With the connection breaking at random, every key stays old, new or absent, whole, and OK is
    kept."""
    behind_a_proxy(rig)
    dice = random.Random(rig.seed)
    size, keys = rig.size(20_000), rig.keys(3)
    keeps = rig.claims.on_existing is OnExisting.KEEP
    possible: dict[bytes, set[bytes | None]] = {key: {None} for key in keys}

    def in_doubt(call: Callable[[], Status]) -> Status | None:
        with contextlib.suppress(BackendUnavailable):
            return call()
        return None

    for step in range(600 if rig.full else 120):
        key, faulty = dice.choice(keys), dice.random() < 0.4
        if faulty:
            most = dice.choice((60, 400, size + 2000))
            rig.proxy.faults.cut_after_bytes = rig.proxy.sent_bytes + dice.randrange(most)
            if dice.random() < 0.5:
                reply = rig.proxy.reply_bytes + dice.randrange(size)
                rig.proxy.faults.cut_reply_after_bytes = reply
        op = dice.choice(("put", "put", "get", "delete"))
        if op == "put":
            content = value(step, size)
            said = in_doubt(lambda k=key, c=content: rig.put({k: c}, seconds=2.0)[0])  # type: ignore[misc]
            if said is not Status.OK:
                possible[key] |= {content, None}
            elif keeps:
                possible[key] = {content if each is None else each for each in possible[key]}
            else:
                possible[key] = {content}
        elif op == "delete":
            said = in_doubt(lambda k=key: rig.store.delete([k], within(2.0))[0])  # type: ignore[misc]
            possible[key] = {None} if said is Status.OK else possible[key] | {None}
        rig.proxy.faults.cut_after_bytes = rig.proxy.faults.cut_reply_after_bytes = -1
        with contextlib.suppress(BackendUnavailable):
            result, found = rig.get(key, size, seconds=2.0)
            if result.status in (Status.OK, Status.MISS, Status.CORRUPT):
                what = f"step {step} of seed {rig.seed} ({op}, {'cut' if faulty else 'no fault'})"
                rig.expect_allowed(result.status, found, possible[key], what)
                possible[key] = {found if result.status is Status.OK else None}
