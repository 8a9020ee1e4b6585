"""Every operation of the controller on two real engines, with both kinds of state; then each
process is killed in turn, and the rest goes on.

    python controller_e2e.py --model DIRECTORY --out build/controller.json

Engine ``a`` has its cache in its process, engine ``b`` in node server ``n``.  Between requests the
engines stand idle.  Exits with 1 when an operation is not ok.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleet import CHUNK_TOKENS, Fleet, redis_server, until

TOKENS = 5 * CHUNK_TOKENS + 16
"""Of a prompt: five whole chunks, and some to compute."""
CHUNKS = TOKENS // CHUNK_TOKENS
WORDS = (
    "river stone cloud green walk seven paper light often house under maple".split()  # noqa: SIM905
)


def prompt(seed: int) -> str:
    """A text that no other seed's begins like."""
    rng = random.Random(seed)
    return f"Story {seed}. " + " ".join(rng.choice(WORDS) for _ in range(TOKENS + 200))


class Run:
    """Operations with one kind of state.

    Attributes:
        rows: how each went.
    """

    def __init__(self, fleet: Fleet, state: str, seed: int) -> None:
        self.fleet = fleet
        self.state = state
        self.seed = seed
        self.rows: list[dict[str, Any]] = []

    def text(self, number: int) -> str:
        return prompt(self.seed + number)

    def do(self, name: str, operation: Callable[[], str | None]) -> None:
        """One operation; what it gives is noted."""
        start_s = time.monotonic()
        note, ok = "", True
        try:
            note = operation() or ""
        except Exception as error:
            ok, note = False, f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
        seconds = round(time.monotonic() - start_s, 3)
        self.rows.append(
            {"name": name, "state": self.state, "ok": ok, "seconds": seconds, "note": note}
        )
        print(
            f"{self.state:7} {name:18} {'ok' if ok else 'FAILED':7} {seconds:7.2f} s  {note}",
            flush=True,
        )

    # What is seen.

    def holds(self, number: int, instance: str, *, salt: str = "") -> dict[str, int]:
        """Chunks of prompt ``number`` by tier, of those that an instance has without a gap."""
        tenant = ("--tenant", salt) if salt else ()
        ids = self.fleet.directory / f"ids-{self.seed + number}.json"
        found = self.fleet.lmc("lookup", "--tokens", str(ids), *tenant)
        for row in found["instances"]:
            if row["instance"] == instance:
                return {tier["tier"]: tier["chunks"] for tier in row["tiers"]}
        return {}

    def serve(self, engine: str, number: int, *, salt: str = "", name: str = "") -> dict[str, Any]:
        """Prompt ``number`` at an engine."""
        told = self.fleet.ask(engine, self.text(number), first=TOKENS, salt=salt, name=name)
        ids = self.fleet.directory / f"ids-{self.seed + number}.json"
        ids.write_text(json.dumps(told["ids"]))
        return told

    def stored(self, number: int, instance: str, **more: Any) -> None:
        """Wait until an instance has all of a prompt, in host and on disk."""
        want = {"host": CHUNKS, "disk": CHUNKS}
        until(
            lambda: self.everywhere(number, instance, **more) == want,
            f"prompt {number} at {instance}",
        )

    def everywhere(self, number: int, instance: str, **more: Any) -> dict[str, int]:
        """As `holds`, but a chunk counts in every tier that has it."""
        return self.holds(number, instance, **more)

    def ids(self, number: int) -> tuple[str, str]:
        return "--tokens", str(self.fleet.directory / f"ids-{self.seed + number}.json")

    # Operations.

    def health(self) -> str:
        def well() -> Any:
            found = self.fleet.lmc("status", codes=(0, 1))
            return found if found["status"] == "ok" and found["instances"] == 3 else None

        found = until(well, "three live instances")
        kept = "sqlite" if found["state"].endswith(".sqlite") else "redis"
        assert kept == self.state, found
        return f"{found['instances']} instances"

    def instances(self) -> str:
        rows = {row["name"]: row for row in self.fleet.lmc("instances")["instances"]}
        assert rows["a"]["kind"] == "embedded" and rows["n"]["kind"] == "node", rows
        assert rows["b"]["kind"] == "engine" and rows["b"]["node"] == "n", rows["b"]
        assert rows["n"]["workers"] == ["b"], rows["n"]
        assert [tier["name"] for tier in rows["a"]["tiers"]][:2] == ["host", "disk"]
        return ", ".join(f"{name} {row['kind']}" for name, row in rows.items())

    def lookup(self) -> str:
        cold = self.serve("a", 1)
        self.stored(1, "a")
        by_text = self.fleet.lmc("lookup", "--text", self.text(1))
        assert by_text["prompt_tokens"] > TOKENS
        row = next(row for row in by_text["instances"] if row["instance"] == "a")
        assert row["chunks"] == CHUNKS, by_text
        by_key = self.fleet.lmc("lookup", "--keys", ",".join(by_text["keys"][:2]))
        assert by_key["instances"], by_key
        assert not self.holds(1, "n")
        return f"{cold['prefilled_tokens']} tokens prefilled, {row['chunks']} chunks found"

    def pin(self) -> str:
        pinned = self.fleet.lmc(
            "pin", *self.ids(1), "--owner", "e2e", "--ttl-s", "600", "--instance", "a"
        )
        self.pin_id = (
            pinned["pin"]
            if isinstance(pinned.get("pin"), str) and pinned.get("pin")
            else pinned["id"]
        )
        for number in range(10, 16):
            self.serve("a", number)
        assert self.holds(1, "a").get("host") == CHUNKS, self.holds(1, "a")
        assert self.holds(10, "a").get("host", 0) < CHUNKS, "nothing was under pressure"
        return "survived six prompts"

    def unpin(self) -> str:
        self.fleet.lmc("unpin", self.pin_id)
        assert not self.fleet.lmc("pins")["pins"]
        for number in range(16, 22):
            self.serve("a", number)
        assert self.holds(1, "a").get("host", 0) < CHUNKS
        assert self.holds(1, "a").get("disk"), "the disk still has it"
        return "evicted by six more"

    def copy(self) -> str:
        job = self.fleet.lmc("copy", "a/disk", "n/host", *self.ids(1))
        assert job["state"] == "done" and job["bytes"] > 0, job
        assert self.holds(1, "n").get("host") == CHUNKS
        warm = self.serve("b", 1)
        assert warm["prefilled_tokens"] < CHUNK_TOKENS, warm
        assert warm["token_ids"] == self.serve("a", 1)["token_ids"]
        return f"{job['bytes'] >> 20} MiB; b prefilled {warm['prefilled_tokens']} tokens"

    def move(self) -> str:
        self.serve("a", 2)
        self.stored(2, "a")
        job = self.fleet.lmc("move", "a/disk", "n/disk", *self.ids(2))
        assert job["state"] == "done", job
        assert self.holds(2, "n").get("disk") == CHUNKS, self.holds(2, "n")
        until(lambda: "disk" not in self.holds(2, "a"), "nothing is left on a's disk")
        return f"{job['bytes'] >> 20} MiB from a's disk to n's"

    def compress(self) -> str:
        self.before_bytes = self.disk_bytes("n")
        job = self.fleet.lmc("compress", "disk", "--codec", "zstd", "--instance", "n", *self.ids(2))
        assert job["state"] == "done", job
        after = until(lambda: (b := self.disk_bytes("n")) < self.before_bytes and b, "fewer bytes")
        self.fleet.lmc("clear", *self.ids(2), "--instance", "n", "--tier", "host", "--yes")
        warm = self.serve("b", 2)
        assert warm["prefilled_tokens"] < CHUNK_TOKENS, warm
        return f"{after / self.before_bytes:.2f} of the bytes"

    def decompress(self) -> str:
        job = self.fleet.lmc("decompress", "disk", "--instance", "n", *self.ids(2))
        assert job["state"] == "done", job
        until(lambda: self.disk_bytes("n") >= self.before_bytes, "as many bytes as before")
        return ""

    def disk_bytes(self, instance: str) -> int:
        rows = self.fleet.lmc("usage", "--instance", instance, "--tier", "disk")["usage"]
        return sum(row["bytes"] for row in rows)

    def usage(self) -> str:
        self.serve("a", 3, salt="tenant one")
        self.stored(3, "a", salt="tenant one")
        tenants = {row["tenant_id"] for row in self.fleet.lmc("usage", "--instance", "a")["usage"]}
        assert len(tenants) == 2 and "" in tenants, tenants
        assert not self.holds(3, "a"), "nothing of a tenant is seen without its salt"
        return f"tenants {sorted(tenants)}"

    def quota(self) -> str:
        two_chunks = 2 * (128 * 46080 + 8192)
        quota = self.fleet.lmc(
            "quota", "--tenant", "tenant one", "--bytes", str(two_chunks), "--tier", "host"
        )
        until(lambda: self.host_chunks(3, "tenant one") <= 2, "the tenant's share is kept")
        self.fleet.lmc("quota", "--remove", quota["id"])
        return "two chunks of five stayed in host"

    def host_chunks(self, number: int, salt: str) -> int:
        rows = self.fleet.lmc("usage", "--instance", "a", "--tier", "host")["usage"]
        return sum(row["chunks"] for row in rows if row["tenant_id"])

    def misses(self) -> str:
        self.serve("a", 30, name=f"new-{self.seed}")
        found = self.fleet.lmc("misses", f"new-{self.seed}")
        reasons = {row["reason"] for row in found["misses"]}
        assert reasons == {"never_stored"}, found
        self.fleet.lmc("clear", *self.ids(30), "--yes")
        self.serve("a", 30, name=f"cleared-{self.seed}")
        found = self.fleet.lmc("misses", f"cleared-{self.seed}")
        assert found["misses"][0]["reason"] == "evicted", found
        assert "cleared" in found["misses"][0]["detail"], found
        return f"{found['misses'][0]['reason']}: {found['misses'][0]['detail']}"

    def reuse(self) -> str:
        """A peer is found by the directory, not by a list."""
        self.serve("a", 31)
        self.stored(31, "a")
        warm = self.serve("b", 31)
        assert warm["prefilled_tokens"] < CHUNK_TOKENS, warm
        return f"b prefilled {warm['prefilled_tokens']} tokens of what a has"

    def clear(self) -> str:
        self.fleet.lmc("clear", "--tenant", "tenant one", "--yes")
        assert not self.holds(3, "a", salt="tenant one")
        assert self.holds(31, "a"), "others' chunks stay"
        job = self.fleet.lmc("clear", "--all", "--yes")
        assert job["state"] == "done", job
        for number in (1, 2, 31):
            assert not self.holds(number, "a") and not self.holds(number, "n"), number
        assert not list((self.fleet.directory / "a-disk").rglob("*.kv")), "files are left"
        cold = self.serve("b", 31)
        assert cold["prefilled_tokens"] == cold["prompt_tokens"], cold
        return f"{job['settled']} chunk copies"

    def check_finish(self) -> str:
        self.serve("a", 32)
        self.stored(32, "a")
        started = self.fleet.lmc("copy", "a/host", "n/host", *self.ids(32), "--no-wait")
        done = self.fleet.lmc("jobs", started["id"], "--wait")
        assert done["state"] == "done" and done["settled"] == done["total"], done
        listed = self.fleet.lmc("jobs")["jobs"]
        assert listed[0]["id"] == started["id"], listed[0]
        return f"{len(listed)} jobs listed"

    def all(self) -> None:
        """One after the other."""
        for name in (
            "health", "instances", "lookup", "pin", "unpin", "copy", "move", "compress",
            "decompress", "usage", "quota", "misses", "reuse", "clear", "check_finish",
        ):  # fmt: skip
            self.do(name, getattr(self, name))


class Kills(Run):
    """Each process in turn; two controllers share a Redis."""

    def one_controller(self) -> str:
        """Controller 0 dies; the other one has its jobs and pins, and goes on."""
        self.serve("a", 40)
        self.stored(40, "a")
        self.fleet.lmc("pin", *self.ids(40), "--owner", "e2e", "--ttl-s", "600", "--instance", "a")
        self.fleet.controllers.pop(0).kill()
        assert len(self.fleet.lmc("pins")["pins"]) == 1
        job = self.fleet.lmc("copy", "a/host", "n/host", *self.ids(40))
        assert job["state"] == "done", job
        return "pins and jobs are the other's"

    def both_controllers(self) -> str:
        """Without any, engines serve; those that come back know everything again."""
        self.fleet.controllers.pop(1).kill()
        warm = self.serve("a", 40)
        assert warm["prefilled_tokens"] < CHUNK_TOKENS, warm
        for number in (0, 1):
            self.fleet.start_controller(number, self.redis)
        until(lambda: self.holds(40, "a").get("host") == CHUNKS, "the directory is whole again")
        assert len(self.fleet.lmc("pins")["pins"]) == 1
        return "requests went on; the directory came back"

    def the_embedded_engine(self) -> str:
        """Its disk tier outlives it; an order that reaches its next process works by the tag."""
        self.fleet.kill_engine("a")
        until(lambda: self.states().get("a") != "live", "a is lost")
        warm = self.serve("b", 40)
        assert warm["prefilled_tokens"] < CHUNK_TOKENS, "n has it"
        self.fleet.start_engine("a")
        until(lambda: self.states().get("a") == "live", "a is back", 120)
        until(lambda: self.holds(40, "a").get("disk"), "what its disk holds is known")
        until(lambda: self.holds(40, "a").get("host") == CHUNKS, "its pin is there again")
        model = self.fleet.lmc("lookup", *self.ids(40))["model"]
        job = self.fleet.lmc("clear", "--model", model, "--instance", "a", "--yes")
        assert job["state"] == "done" and not self.holds(40, "a"), job
        return "found, pinned and cleared what an earlier process stored"

    def the_node_server(self) -> str:
        """Its engine computes; the next server takes over."""
        assert self.fleet.node is not None
        self.fleet.lmc("copy", "n/host", "n/disk", *self.ids(40))
        self.fleet.node.kill()
        cold = self.serve("b", 41)
        assert cold["prefilled_tokens"] == cold["prompt_tokens"], cold
        self.fleet.start_node()
        until(lambda: self.states().get("n") == "live", "n is back")
        until(lambda: self.holds(40, "n").get("disk"), "what its disk holds is known")

        def served() -> bool:
            return bool(self.serve("b", 40)["prefilled_tokens"] < CHUNK_TOKENS)

        until(served, "b has its node server again", 60)
        return "b computed, then found its server again"

    def the_engine_of_the_node(self) -> str:
        self.fleet.kill_engine("b")
        until(lambda: self.states().get("b") != "live", "b is lost")
        job = self.fleet.lmc("copy", "n/disk", "n/host", *self.ids(40))
        assert job["state"] == "done", job
        return "its node server goes on"

    def a_lost_instance(self) -> str:
        """An order to it ends, with the reason."""
        self.fleet.kill_engine("a")
        until(lambda: self.states().get("a") != "live", "a is lost")
        job = self.fleet.lmc("clear", "--all", "--instance", "a", "--yes", codes=(1, 2))
        return f"told: {str(job)[:120]}"

    def states(self) -> dict[str, str]:
        return {row["name"]: row["state"] for row in self.fleet.lmc("instances")["instances"]}

    def all(self) -> None:
        for name in (
            "one_controller", "both_controllers", "the_embedded_engine", "the_node_server",
            "the_engine_of_the_node", "a_lost_instance",
        ):  # fmt: skip
            self.do(f"kill: {name}", getattr(self, name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/controller.json"))
    parser.add_argument("--keep", action="store_true", help="keep the directory with the logs")
    options = parser.parse_args()
    start_s = time.monotonic()
    rows: list[dict[str, Any]] = []
    directory = Path(tempfile.mkdtemp(prefix="lmc-e2e-"))
    fleet = Fleet(directory, options.model)
    try:
        fleet.start_controller(0, str(directory / "controller.sqlite"))
        fleet.start_node()
        for name in ("a", "b"):
            fleet.start_engine(name)
        for engine in fleet.engines.values():
            assert engine.address is not None
        first = Run(fleet, "sqlite", 1000)
        first.all()
        rows += first.rows
        fleet.controllers.pop(0).close()
        with redis_server(directory) as url:
            for number in (0, 1):
                fleet.start_controller(number, url)
            second = Run(fleet, "redis", 2000)
            second.all()
            kills = Kills(fleet, "redis", 3000)
            kills.redis = url
            kills.all()
            rows += second.rows + kills.rows
    finally:
        fleet.close()
        ok = bool(rows) and all(row["ok"] for row in rows)
        seconds = round(time.monotonic() - start_s, 1)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({"ok": ok, "seconds": seconds, "operations": rows}, indent=1)
        )
        print(f"{'ok' if ok else 'NOT OK'} in {seconds} s: {options.out}; logs in {directory}")
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
