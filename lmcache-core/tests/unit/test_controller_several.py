"""Several controllers on one store, and controllers that are killed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
from controller_redis import RedisServer, redis_server
from controller_rig import LIMIT_S, Worker, keys_of, model, prompt, rig, until
from controller_rig import workers as workers_of

from lmcache_core.controller.state_redis import RedisState

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


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as found:
        yield found


def test_two_controllers_are_one(server: RedisServer) -> None:
    server.empty()
    with rig(RedisState(server.url)) as one, rig(RedisState(server.url)) as other:
        first = workers(one)[0]
        again = Worker(
            other.made_client("instance-token-0123456789"), name="giver", models=(SERVED,),
            held={"host": set(), "disk": set(KEYS)},
        )  # fmt: skip
        first.step()
        again.step()
        job = one.post("/v1/clear", {"select": SELECT}, key="k")
        until(lambda: other.client.get(f"/v1/jobs/{job['id']}").status_code == 200)
        assert other.post("/v1/clear", {"select": SELECT}, key="k") == job
        until(lambda: again.step() or again.run)  # the other one hands it out
        again.step()
        assert other.job(job["id"]).state == "done"
        until(lambda: one.job(job["id"]).state == "done")
        first.step()
        assert not first.run, "what is done is not told again"
        pin = other.post(
            "/v1/pins", {"select": SELECT, "owner": "me", "ttl_s": 60, "instances": ["giver"]}
        )
        until(lambda: one.get("/v1/pins")["pins"] == [pin])
        one.client.delete(f"/v1/pins/{pin['id']}")
        until(lambda: other.get("/v1/pins")["pins"] == [])
        both = sorted([one.controller.id, other.controller.id])
        until(lambda: one.get("/v1/health")["controllers"] == both)


def test_an_instance_that_one_of_two_lost_is_not_lost(server: RedisServer) -> None:
    server.empty()
    with (
        rig(RedisState(server.url), lease_s=5) as one,
        rig(RedisState(server.url), lease_s=5) as other,
    ):
        here = workers(one)[0]
        there = Worker(other.made_client("instance-token-0123456789"), name="giver")
        here.step()
        there.step()
        one.clock.now_s += 100
        job = one.post("/v1/clear", {"select": {"all": True}})["id"]
        ticks = one.controller.documents
        seen = ticks._seen
        one.post("/v1/clear", {"select": {"all": True}})
        until(lambda: ticks._seen > seen)
        assert one.job(job).state == "running", "the other one hears it"
        until(lambda: there.step() or one.job(job).state == "done")


# Processes.


class Process:
    """``lmc controller``, to be killed."""

    def __init__(self, directory: Path, state: str) -> None:
        self._command = [
            sys.executable, "-m", "lmcache_core.cli", "controller", "--port", "0", "--json",
            "--state", state, "--token-file", str(directory / "token"),
        ]  # fmt: skip
        self._directory = directory
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = json.loads(self.process.stdout.readline())["address"]

    def client(self) -> httpx.Client:
        token = (self._directory / "token").read_text().strip()
        headers = {"authorization": f"Bearer {token}"}
        return httpx.Client(base_url=self.url, trust_env=False, timeout=LIMIT_S, headers=headers)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def restart(self) -> None:
        self.kill()
        self._start()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_a_killed_controller_goes_on_where_it_was(kind: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        state = str(tmp_path / "state")
        if kind == "redis":
            state = stack.enter_context(redis_server()).url
        process = Process(tmp_path, state)
        stack.callback(lambda: process.kill())
        crew = [
            Worker(
                process.client(), name=name, models=(SERVED,),
                status={"channel": f"tcp://{name}:1"},
                held={"host": set(), "disk": set(KEYS) if name == "giver" else set()},
            )
            for name in ("giver", "taker")
        ]  # fmt: skip
        giver, taker = crew
        for worker in crew:
            worker.step()
        made = crew[0].client.post("/v1/move", json=MOVE, headers={"idempotency-key": "k"})
        job = made.json()["id"]
        for _ in range(3):  # in the middle: after each step of it
            until(lambda: giver.step() or taker.step() or giver.ended or taker.ended)
            process.restart()
            for worker in crew:
                worker.meets(process.client())
            again = giver.client.post("/v1/move", json=MOVE, headers={"idempotency-key": "k"})
            assert again.json()["id"] == job

        def ended() -> bool:
            giver.step()
            taker.step()
            return bool(giver.client.get(f"/v1/jobs/{job}").json()["state"] == "done")

        until(ended)
        assert taker.held["host"] == set(KEYS) and giver.held["disk"] == set()
