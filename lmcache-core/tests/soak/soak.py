"""Two engines on a node server under random prompts and restarts, for as long as you like.

    python soak.py --minutes 2 --out build/soak.json

Engines are killed, or ended; the server is killed, stopped for a moment, or ended.  Every answer
must equal that of a run without a cache; the server and what our code allocates in an engine may
not grow.  Exits with 1 when the report
is not ok.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SETTLED_S = 15.0
"""How long a process must have lived before its memory is looked at."""
MAX_GROWTH_BYTES = 16 << 20
MAX_ARENAS = 2
START_LIMIT_S = 120.0
EVERY_S = 8.0


def growth(sizes: list[int]) -> int:
    """Between the first and the last third."""
    third = max(1, len(sizes) // 3)
    return max(sizes[-third:]) - max(sizes[:third]) if len(sizes) > 1 else 0


class Child:
    """An engine in a process of its own, whose lines a thread collects."""

    def __init__(self, soak: Soak, seed: int, extra: dict[str, Any] | None) -> None:
        command = [sys.executable, str(HERE / "engine.py"), str(soak.model), json.dumps(extra)]
        paths = [str(HERE.parent / "vllm"), str(HERE)]
        self.log = (soak.directory / f"engine-{seed}.log").open("w")
        self.process = subprocess.Popen(
            [*command, str(soak.prompts), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self.born_s = time.monotonic()
        self.lines: list[dict[str, Any]] = []
        self.looks: list[dict[str, int]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("SOAK "):
                said = json.loads(line[5:])
                if "own_bytes" in said:
                    self.looks.append(said)
                self.lines.append(said)

    @property
    def batches(self) -> list[dict[str, Any]]:
        return [line for line in list(self.lines) if "requests" in line]

    def growth_bytes(self, name: str) -> int:
        """Of one of the sizes that it reports, since it settled."""
        return growth([look[name] for look in self.looks[1:]])

    def wait_for(self, word: str) -> dict[str, Any]:
        end_s = time.monotonic() + START_LIMIT_S
        while time.monotonic() < end_s:
            for line in list(self.lines):
                if word in line:
                    return line
            self.check()
            time.sleep(0.05)
        raise RuntimeError(f"an engine did not get to {word!r} in {START_LIMIT_S} s")

    def check(self) -> None:
        """Raise when it ended by itself."""
        if self.process.poll() is not None:
            said = Path(self.log.name).read_text()[-3000:]
            raise RuntimeError(f"an engine ended with {self.process.returncode}: {said}")

    def end(self, *, kill: bool) -> None:
        assert self.process.stdin is not None
        if kill:
            self.process.kill()
        else:
            self.process.stdin.close()
        self.process.wait(60)
        self._reader.join(10)
        self.log.close()


class Soak:
    """One run in ``directory``."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.rng = random.Random(seed)
        self.model = directory / "model"
        self.prompts = directory / "prompts.json"
        self.socket = str(directory / "node.sock")
        self.restarts: dict[str, int] = {}
        self.ended: list[Child] = []
        self.server_rss: list[list[int]] = []
        self._seeds = 0

    def prepare(self) -> None:
        """The model, the prompts, and their answers without a cache."""
        sys.path.insert(0, str(HERE.parent / "vllm"))
        import tiny_models

        tiny_models.llama(self.model)
        trunks = [self._tokens(400 + 150 * i) for i in range(6)]
        prompts = []
        for i in range(48):
            trunk = trunks[i % len(trunks)]
            prompts.append(trunk[: self.rng.randrange(60, len(trunk))] + self._tokens(i % 9 * 20))
        self.prompts.write_text(json.dumps({"prompts": prompts}))
        child = Child(self, 0, None)
        answers = child.wait_for("answers")["answers"]
        child.end(kill=False)
        self.prompts.write_text(json.dumps({"prompts": prompts, "answers": answers}))

    def run(self, minutes: float) -> dict[str, Any]:
        """Soak; returns the report."""
        self._serve()
        engines = [self._engine() for _ in range(2)]
        try:
            for engine in engines:
                engine.wait_for("ready")
            self._go_on(engines, time.monotonic() + 60 * minutes)
            for engine in engines:
                engine.end(kill=False)
            self.ended += engines
            return self._report(self._end_server(signal.SIGTERM))
        finally:
            for process in (*(engine.process for engine in engines), self.server):
                if process.poll() is None:
                    process.kill()

    def _go_on(self, engines: list[Child], end_s: float) -> None:
        """One trouble at a time, the next when every engine answers again."""
        next_s = time.monotonic() + EVERY_S
        while time.monotonic() < end_s:
            time.sleep(1)
            self._look_at_server()
            for engine in engines:
                engine.check()
            answering = all(engine.batches for engine in engines)
            if answering and time.monotonic() > next_s:
                next_s = time.monotonic() + EVERY_S
                number = self.rng.randrange(len(engines))
                engines[number] = self._trouble(engines[number])

    def _trouble(self, engine: Child) -> Child:
        """Something happens; returns the engine that goes on."""
        what = self.rng.choice(
            ["engine_killed", "engine_ended", "server_killed", "server_frozen", "server_ended"]
        )
        self.restarts[what] = self.restarts.get(what, 0) + 1
        if what.startswith("engine"):
            engine.end(kill=what == "engine_killed")
            self.ended.append(engine)
            return self._engine()
        if what == "server_frozen":
            self.server.send_signal(signal.SIGSTOP)
            time.sleep(2)
            self.server.send_signal(signal.SIGCONT)
            return engine
        self._end_server(signal.SIGKILL if what == "server_killed" else signal.SIGTERM)
        self._serve()
        return engine

    def _serve(self) -> None:
        config = self.directory / "node.json"
        tiers = [{"host": "24MiB"}, {"url": f"file://{self.directory}/kv", "size": "48MiB"}]
        config.write_text(json.dumps({"tiers": tiers}))
        command = [sys.executable, "-m", "lmcache_core.cli", "serve", "--json"]
        self.server = subprocess.Popen(
            [*command, "--config", str(config), "--socket", self.socket],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.server.stdout is not None
        assert json.loads(self.server.stdout.readline())["event"] == "ready"
        self._served_s = time.monotonic()
        self.server_rss.append([])

    def _look_at_server(self) -> None:
        if time.monotonic() - self._served_s > SETTLED_S:
            text = Path(f"/proc/{self.server.pid}/status").read_text()
            line = next(row for row in text.split("\n") if row.startswith("RssAnon"))
            self.server_rss[-1].append(int(line.split()[1]) << 10)

    def _end_server(self, how: signal.Signals) -> int:
        self.server.send_signal(how)
        assert self.server.stdout is not None
        self.server.stdout.close()
        return self.server.wait(60)

    def _engine(self) -> Child:
        self._seeds += 1
        extra = {
            "chunk_size": 64,
            "node": self.socket,
            "node_retry_s": 0.2,
            "lookup_deadline_s": 1.0,
        }
        return Child(self, self._seeds, extra)

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(3, 1000) for _ in range(count)]

    def _report(self, server_code: int) -> dict[str, Any]:
        batches = [batch for engine in self.ended for batch in engine.batches]
        own = max(engine.growth_bytes("own_bytes") for engine in self.ended)
        server = max(growth(rss) for rss in self.server_rss)
        arenas = max([look["arenas"] for e in self.ended for look in e.looks], default=0)
        requests = sum(batch["requests"] for batch in batches)
        wrong = sum(batch["wrong"] for batch in batches)
        cached = sum(batch["cached_tokens"] for batch in batches)
        return {
            "ok": not wrong and requests > 0 and cached > 0 and arenas <= MAX_ARENAS
            and max(own, server) < MAX_GROWTH_BYTES and server_code == 0,
            "requests": requests,
            "wrong": wrong,
            "cached_tokens": cached,
            "rss_growth_bytes": max(own, server),
            "rss_growth_bytes_by_process": {
                "server": server,
                "engine_ours": own,
                "engine_with_vllm": max(e.growth_bytes("rss_bytes") for e in self.ended),
            },
            "most_arenas_mapped": arenas,
            "restarts": sum(self.restarts.values()),
            "restarts_by_kind": self.restarts,
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/soak.json"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lmc-soak-") as scratch:
        soak = Soak(Path(scratch), asked.seed)
        soak.prepare()
        report = {"minutes": asked.minutes, "seed": asked.seed, **soak.run(asked.minutes)}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
