"""A controller that dies between any two steps, a store that goes away, and several controllers."""

from __future__ import annotations

import contextlib
import threading
from functools import partial
from typing import Any

import pytest
from controller_redis import redis_server
from controller_rig import Rig, Worker, keys_of, model, prompt, rig, until
from controller_rig import workers as workers_of

from lmcache_core.agent import wire
from lmcache_core.controller.state import State
from lmcache_core.controller.state_redis import RedisState
from lmcache_core.controller.state_sqlite import SqliteState
from lmcache_core.sdk import BackendUnavailable

SERVED = model()
TOKENS = prompt(3)
KEYS = keys_of(SERVED, TOKENS)
SELECT = {"tokens": TOKENS, "model": "m"}
MOVE = {
    "select": SELECT,
    "source": {"instance": "giver", "tier": "disk"},
    "target": {"instance": "taker", "tier": "host"},
}
workers = partial(workers_of, served=SERVED, keys=KEYS)


class Mortal:
    """A store as one process has it: at its ``dies_at``-th call the process is no more, before the
    call is carried out or after.  What was stored stays."""

    def __init__(self, state: State, *, dies_at: int = 0, after: bool = False) -> None:
        self.shared, self.address = state.shared, state.address
        self._state = state
        self._dies_at, self._after = dies_at, after
        self._lock = threading.Lock()
        self.calls = 0
        self.dead = False

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            with self._lock:
                self.calls += 1
                last = self.calls == self._dies_at
                if self.dead or (last and not self._after):
                    self.dead = True
                    raise BackendUnavailable("the process is no more")
                found = getattr(self._state, name)(*args, **options)
                if last:
                    self.dead = True
                    raise BackendUnavailable("the process is no more")
                return found

        return call

    def is_dead(self) -> bool:
        return self.dead

    def close(self) -> None:
        """The store outlives it."""


def moves(made: Rig, crew: list[Worker], dead: Any) -> bool:
    """Have the move made and carried out; False when the controller died first."""
    giver, taker = crew
    job = ""
    for _ in range(400):
        with contextlib.suppress(AssertionError):  # refused while its store is no more
            for worker in crew:
                worker.step()
        everywhere = giver.held["disk"] | giver.held["host"] | taker.held["host"]
        assert everywhere == set(KEYS), "a chunk is lost"
        if dead():
            return False
        if not job:
            answer = made.client.post("/v1/move", json=MOVE, headers={"idempotency-key": "k"})
            job = answer.json().get("id", "")
        elif made.client.get(f"/v1/jobs/{job}").json().get("state") == "done":
            return not dead()
        made.clock.now_s += 1  # what was told and lost is told again
    raise AssertionError(made.client.get("/v1/jobs").text)


def _never() -> bool:
    return False


def moved(made: Rig, crew: list[Worker]) -> None:
    giver, taker = crew
    assert taker.held["host"] == set(KEYS) and giver.held["disk"] == set()
    jobs = made.get("/v1/jobs")["jobs"]
    assert [job["state"] for job in jobs] == ["done"], "one request is one job"
    assert [part["state"] for part in jobs[0]["parts"]] == ["done"] * 4


def calls_of_a_move() -> int:
    state = Mortal(SqliteState(":memory:"))
    with rig(state, tick_s=60) as made:  # type: ignore[arg-type]
        crew = workers(made)
        assert moves(made, crew, _never)
        moved(made, crew)
    return state.calls


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_job_ends_right_wherever_its_controller_dies(after: bool) -> None:
    total = calls_of_a_move()
    assert total > 20
    for number in range(1, total + 1):
        kept = SqliteState(":memory:")
        mortal = Mortal(kept, dies_at=number, after=after)
        with rig(mortal, tick_s=60) as made:  # type: ignore[arg-type]
            crew = workers(made)
            if moves(made, crew, mortal.is_dead):
                moved(made, crew)
                continue
            clock = made.clock
        with rig(Mortal(kept), clock=clock) as made:  # type: ignore[arg-type]
            crew = workers(made, *crew)
            assert moves(made, crew, _never), f"call {number}"
            moved(made, crew)


@pytest.mark.slow
def test_a_job_ends_right_when_instances_die_too() -> None:
    for number in range(1, calls_of_a_move() + 1, 3):
        kept = SqliteState(":memory:")
        mortal = Mortal(kept, dies_at=number)
        with rig(mortal, tick_s=60) as made:  # type: ignore[arg-type]
            crew = workers(made)
            moves(made, crew, mortal.is_dead)
            clock = made.clock
        for worker in crew:
            worker.restarts()  # as a node server with its tiers: what it holds is there still
        with rig(Mortal(kept), clock=clock) as made:  # type: ignore[arg-type]
            crew = workers(made, *crew)
            assert moves(made, crew, _never), f"call {number}"
            moved(made, crew)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_pins_are_whole_or_not_there_wherever_a_controller_dies(after: bool) -> None:
    body = {"select": SELECT, "owner": "me", "ttl_s": 9000, "instances": ["taker"]}

    def pin_and_unpin(made: Rig, crew: list[Worker]) -> None:
        answer = made.client.post("/v1/pins", json=body, headers={"idempotency-key": "k"})
        if answer.status_code == 201:
            for worker in crew:
                worker.step()
            made.client.delete(f"/v1/pins/{answer.json()['id']}")

    count = Mortal(SqliteState(":memory:"))
    with rig(count, tick_s=60) as made:  # type: ignore[arg-type]
        crew = workers(made)
        for worker in crew:
            worker.step()
        pin_and_unpin(made, crew)
    for number in range(1, count.calls + 1):
        kept = SqliteState(":memory:")
        mortal = Mortal(kept, dies_at=number, after=after)
        with rig(mortal, tick_s=60) as made:  # type: ignore[arg-type]
            crew = workers(made)
            with contextlib.suppress(AssertionError):
                for worker in crew:
                    worker.step()
                pin_and_unpin(made, crew)
            clock = made.clock
        with rig(Mortal(kept), clock=clock) as made:  # type: ignore[arg-type]
            crew = workers(made, *crew)
            taker = crew[1]

            def settled(made: Rig = made, crew: list[Worker] = crew) -> bool:
                for worker in crew:
                    worker.step()
                made.clock.now_s += 1
                jobs = made.get("/v1/jobs")["jobs"]
                return all(job["state"] != "running" for job in jobs)

            until(settled)
            pins = {pin["id"] for pin in made.get("/v1/pins")["pins"]}
            for pin in pins:  # seen, and so carried out
                until(lambda pin=pin, taker=taker: settled() and _pinned(taker, pin))
                assert made.client.delete(f"/v1/pins/{pin}").status_code == 202
            until(settled)
            for id in {order.pin for order in taker.run.values() if isinstance(order, wire.Pin)}:
                assert not _pinned(taker, id), f"call {number}: nobody sees {id}"


def _pinned(worker: Worker, pin: str) -> bool:
    """Whether the last that it was told of a pin was to keep it."""
    last = [o for o in worker.run.values() if getattr(o, "pin", "") == pin]
    return bool(last) and isinstance(last[-1], wire.Pin)


# The store goes away.


def test_without_its_store_it_goes_on_with_what_it_knows_and_recovers() -> None:
    with redis_server() as server:
        state = RedisState(server.url, timeout_s=0.2)
        with rig(state) as made:
            crew = workers(made)
            for worker in crew:
                worker.step()
            server.kill()
            made.clock.now_s += 2
            answer = made.client.post("/v1/clear", json={"select": SELECT})
            assert answer.status_code == 503 and answer.headers["retry-after"]
            assert answer.json()["error"]["code"] == "store_unavailable"
            assert answer.json()["error"]["hint"]
            crew[0].stores("host", KEYS[:1])
            found = made.post("/v1/lookup", {"select": SELECT})
            assert found["instances"][0]["chunks"] == 3
            health = made.get("/v1/health")
            assert health["status"] == "degraded" and "state" in health["problems"][0]
            fresh = made.instance("fresh", models=(model("another"),))
            fresh.sync()
            assert made.post("/v1/lookup", {"select": {"tokens": TOKENS, "model": "another"}})
            server.start()

            def works() -> bool:
                made.clock.now_s += 2
                for worker in crew:
                    worker.step()
                answer = made.client.post("/v1/clear", json={"select": SELECT})
                return answer.status_code == 202

            until(works)
            until(lambda: made.get("/v1/health")["status"] == "ok")
            until(lambda: state.count("model") == 2, "names are written when it is back")
            assert made.controller.names.describe(SERVED.tag)[0] == "m"


def test_a_store_that_hangs_is_waited_for_once() -> None:
    with redis_server() as server, rig(RedisState(server.url, timeout_s=0.2)) as made:
        crew = workers(made)
        crew[0].step()
        server.freeze()
        until(lambda: made.controller.documents.down)
        for _ in range(50):  # each would take 0.4 s
            assert made.client.post("/v1/clear", json={"select": SELECT}).status_code == 503
            crew[0].step()
        server.resume()
        made.clock.now_s += 2
        until(lambda: made.client.post("/v1/clear", json={"select": SELECT}).status_code == 202)
