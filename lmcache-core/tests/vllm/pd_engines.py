"""Engines in processes of their own that push to, borrow from and lend to each other.

Run as a program it is one of these engines: the demo's, with orders that look inside it.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmcache_core.demo import pd_child, pd_pair

CHUNK = 256
TINY_TOKEN_BYTES = 4 * 2 * 2 * 32 * 4
"""Of the demo's tiny Llama: layers, keys and values, heads, dimensions, fp32."""
LIMIT_S = 60.0
TAKES_LONG_S = 30.0
"""A deadline that no test may reach."""
DECODED = 12


class Inspected(pd_child.Child):
    """Orders by name, beside the demo's: ``state``, ``pause``, ``slow``, ``deadline_s``,
    ``forget``, ``forget_when_asked``."""

    def __init__(self, order: dict[str, Any]) -> None:
        super().__init__(order)
        self._slow_s = 0.0
        step = self.engine.step

        def slow_step() -> Any:
            outputs = step()
            if self._slow_s and self.engine.has_unfinished_requests():
                time.sleep(self._slow_s)
            return outputs

        self.engine.step = slow_step

    def _start(self, order: dict[str, Any]) -> None:
        told: dict[str, Any] = {}
        if "state" in order:
            told = self._state()
        elif "slow" in order:
            self._slow_s = order["slow"]
        elif "deadline_s" in order:
            self._set_deadline(order["deadline_s"])
        elif "forget" in order:
            self._cache.reset()
        elif "forget_when_asked" in order:
            self._forget_when_asked()
        elif "pause" not in order:
            super()._start(order)
            return
        print(json.dumps({"name": order["name"], **told}), flush=True)
        if "pause" in order:
            # No step until the next order.
            while not (lines := self._lines(60.0)):
                pass
            for line in lines:
                if line is None:
                    raise SystemExit
                self._start(json.loads(line))

    @property
    def _cache(self) -> Any:
        return self._scheduler.connector.scheduler.cache

    def _state(self) -> dict[str, Any]:
        """What must be as it was when nothing runs."""
        scheduler, half = self._scheduler, self._scheduler.connector.scheduler
        stepping = scheduler.has_requests()
        engine = self._cache.engine
        engine.poll()
        chunks = list(engine.host._chunks.values())
        (transport,) = engine.parts
        return {
            "free_blocks": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            "stepping": stepping,
            "requests": len(scheduler.requests),
            "live": len(half._lookups.live) + len(half._loading),
            "transfers": len(half._transfers._pushes) + len(half._transfers._expected),
            "busy": transport.busy,
            "expected_bytes": transport.receiver._bytes,
            "lent_bytes": transport.lender.lent_bytes,
            "writing": sum(chunk.state.value != "sealed" for chunk in chunks),
            "pins": sum(chunk.pins for chunk in chunks),
            "lost_bytes": engine.host.lost_bytes,
            "slots": len(chunks),
            "unheld_bytes": engine.host.used_bytes
            - sum(chunk.payload_bytes + 4096 for chunk in chunks),
            "gauges": engine.metrics.gauges(),
        }

    def _set_deadline(self, deadline_s: float) -> None:
        import msgspec

        cache = self._cache
        cache.config = msgspec.structs.replace(cache.config, transfer_deadline_s=deadline_s)

    def _forget_when_asked(self) -> None:
        """Once: lose every chunk after a peer was told what is here, before it reads."""
        from lmcache_core.opening import transport_of
        from lmcache_core.transport.messages import Borrow

        engine = self._cache.engine
        transport = transport_of(engine)
        assert transport is not None
        hub = transport.hub
        borrow = hub._handlers[Borrow]

        def forget(peer: str, message: Borrow) -> None:
            hub.on(Borrow, borrow)
            engine.host.drop(engine.host.keys())
            borrow(peer, message)

        hub.on(Borrow, forget)


class Engine(pd_pair.Engine):
    """One of them."""

    def __init__(self, log: Path, model: Path, **wish: Any) -> None:
        options = {"skip_tokenizer_init": True, **wish.pop("options", {})}
        super().__init__(log, str(model), options=options, program=[__file__], **wish)
        self._fresh_state: dict[str, Any] = {}
        self._orders = 0

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def tell(self, **order: Any) -> dict[str, Any]:
        """The answer to one of `Inspected`'s orders."""
        self._orders += 1
        name = f"order-{self._orders}"
        self.ask(name, **order)
        return self.answer(name, LIMIT_S)

    def start(self, name: str, ids: list[int], params: Any, tokens: int = DECODED) -> None:
        """Have it answer a prompt."""
        self.ask(name, ids=ids, tokens=tokens, params=params)

    def run(self, ids: list[int], params: Any = None, tokens: int = DECODED) -> dict[str, Any]:
        """Its answer to a prompt."""
        name = f"run-{secrets.token_hex(6)}"
        self.start(name, ids, params, tokens)
        return self.answer(name, LIMIT_S)

    def remember(self) -> None:
        """What is free now must be free again whenever it is `quiet`."""
        self._fresh_state = self.tell(state=True)

    def assert_quiet(self) -> dict[str, Any]:
        """Soon it holds nothing for anyone: no request, page, slot, pin, loan or transfer."""
        wanted = {name: 0 for name in NOTHING} | {"free_blocks": self._fresh_state["free_blocks"]}
        wanted["unheld_bytes"] = self._fresh_state["unheld_bytes"]
        found: dict[str, Any] = {}

        def quiet() -> bool:
            nonlocal found
            found = self.tell(state=True)
            return all(found[name] == value for name, value in wanted.items())

        with contextlib.suppress(TimeoutError):
            until(quiet, limit_s=10)
        differ = {name: found[name] for name, value in wanted.items() if found[name] != value}
        assert not differ, f"{self.log.name} still has {differ}"
        return found

    def counted(self, name: str) -> float:
        return self.metrics().get(name, 0)

    @contextlib.contextmanager
    def slowed(self, step_s: float) -> Iterator[None]:
        """Each of its steps takes ``step_s`` longer."""
        self.tell(slow=step_s)
        try:
            yield
        finally:
            if self.alive:
                self.tell(slow=0)

    @contextlib.contextmanager
    def waiting_at_most(self, deadline_s: float) -> Iterator[None]:
        """Its ``transfer_deadline_s`` meanwhile."""
        self.tell(deadline_s=deadline_s)
        try:
            yield
        finally:
            if self.alive:
                self.tell(deadline_s=TAKES_LONG_S)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """Frozen or not; one that has ended stays so."""
        self.signal(signal.SIGKILL)
        self._process.wait(10)

    def ended(self, limit_s: float = 20.0) -> int:
        """The status that it ends with by itself, having been told to `end`."""
        return self._process.wait(limit_s)


NOTHING = (
    "stepping",
    "requests",
    "live",
    "transfers",
    "busy",
    "expected_bytes",
    "lent_bytes",
    "writing",
    "pins",
    "lost_bytes",
)


class Engines:
    """Engines of one model over one channel; every one ends with it.

    Args:
        extra: of all.
    """

    def __init__(
        self, logs: Path, model: Path, *, channel: str = "tcp", extra: dict[str, Any] | None = None
    ) -> None:
        self._logs, self._model = logs, model
        token = logs / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.settings: dict[str, Any] = {
            "chunk_size": CHUNK,
            "host_bytes": "192MiB",
            "channel": f"{channel}://127.0.0.1:0",
            "channel_token_file": str(token),
            "transfer_deadline_s": TAKES_LONG_S,
            **(extra or {}),
        }
        self._all: list[Engine] = []
        self._names: Counter[str] = Counter()
        self._references: dict[tuple[int, ...], list[int]] = {}
        self._alone: Engine | None = None

    def start(self, role: str, *, options: dict[str, Any] | None = None, **extra: Any) -> Engine:
        """Another engine, on its way; ``role`` "" has no connector."""
        self._names[role] += 1
        log = self._logs / f"{role or 'alone'}-{self._names[role]}.log"
        wish: dict[str, Any] = {"options": options or {}}
        if role:
            settings = {**self.settings, **extra}
            wish |= {"connector": "LMCacheCoreConnector", "role": role, "extra": settings}
        engine = Engine(log, self._model, **wish)
        self._all.append(engine)
        return engine

    def start_alone(self) -> None:
        """The engine that `reference` asks."""
        self._alone = self.start("")

    def reference(self, ids: list[int]) -> list[int]:
        """What an engine without a connector answers."""
        assert self._alone is not None
        if tuple(ids) not in self._references:
            self._references[tuple(ids)] = self._alone.run(ids)["token_ids"]
        return self._references[tuple(ids)]

    def close(self) -> None:
        """End them at once: what they hold is theirs alone."""
        for engine in self._all:
            engine.kill()
            engine.close()


class Pd(Engines):
    """A prefiller, a decoder and an engine without a connector.

    Args:
        options: of prefiller and decoder.
    """

    def __init__(
        self, logs: Path, model: Path, *, options: dict[str, Any] | None = None, **wish: Any
    ) -> None:
        super().__init__(logs, model, **wish)
        try:
            self.prefiller = self.start("kv_producer", options=options)
            self.decoder = self.start("kv_consumer", options=options)
            self.start_alone()
            for engine in (self.prefiller, self.decoder):
                engine.address  # noqa: B018  waits for its start
                engine.remember()
        except BaseException:
            self.close()
            raise

    def replace_prefiller(self) -> None:
        self.prefiller.close()
        self.prefiller = self.start("kv_producer")
        assert self.prefiller.address
        self.prefiller.remember()

    def replace_decoder(self) -> None:
        self.decoder.close()
        self.decoder = self.start("kv_consumer")
        assert self.decoder.address
        self.decoder.remember()

    def begin(self, ids: list[int]) -> str:
        """Ask both at once, as the proxy does; the request's name."""
        name = f"pd-{secrets.token_hex(6)}"
        self.decoder.start(name, ids, decode(name))
        self.prefiller.start(name, ids, prefill(name, self.decoder.address), 1)
        return name

    def run(self, ids: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What prefiller and decoder told."""
        name = self.begin(ids)
        return self.prefiller.answer(name, LIMIT_S), self.decoder.answer(name, LIMIT_S)

    def begin_slowly(self, ids: list[int]) -> str:
        """As `begin`; returns when some chunks, not all, are at the decoder."""
        before = self.decoder.counted("receive.chunks")
        name = self.begin(ids)
        until(lambda: self.decoder.counted("receive.chunks") >= before + 2)
        assert self.decoder.tell(state=True)["transfers"] == 1, "it still waits for more"
        return name

    def assert_works(self, seed: int) -> None:
        """A fresh prompt goes from one to the other, and nothing is left behind."""
        from conftest import random_tokens

        ids = random_tokens(seed, 2 * CHUNK + 50)
        _, decoded = self.run(ids)
        assert decoded["token_ids"] == self.reference(ids)
        assert transfer(decoded) == {"received_bytes": moved(ids), "reason": ""}
        self.assert_quiet()

    def assert_quiet(self) -> None:
        self.prefiller.assert_quiet()
        self.decoder.assert_quiet()


def decode(name: str) -> dict[str, Any]:
    return {"lmcache": {"role": "decode", "transfer_id": name}}


def prefill(name: str, decoder: str) -> dict[str, Any]:
    return {"lmcache": {"role": "prefill", "transfer_id": name, "decoder": decoder}}


def transfer(told: dict[str, Any]) -> dict[str, Any] | None:
    """What a response says of its transfer."""
    found = told["kv"]["lmcache"].get("transfer")
    return dict(found) if found is not None else None


def cached(told: dict[str, Any]) -> dict[str, int]:
    """Tokens that a response had from each tier."""
    return dict(told["kv"]["lmcache"]["cached_tokens"])


def recomputed(decoded: dict[str, Any]) -> int:
    """Prompt tokens that the decoder computed, but for the last one, whose logits it needs."""
    return int(decoded["prefilled_tokens"]) - 1


def waited_s(told: dict[str, Any]) -> float:
    """From a request's arrival to its first step."""
    return float(told["first_step_s"] - told["added_s"])


def moved(ids: list[int]) -> int:
    """Bytes of the slots of a prompt of the tiny Llama; its last chunk has a whole slot too."""
    return -(-len(ids) // CHUNK) * CHUNK * TINY_TOKEN_BYTES


def until(ready: Callable[[], object], *, limit_s: float = LIMIT_S) -> None:
    """Wait for ``ready``.

    Raises:
        TimeoutError: it does not come.
    """
    end_s = time.monotonic() + limit_s
    while not ready():
        if time.monotonic() > end_s:
            raise TimeoutError(f"not within {limit_s:g} s")
        time.sleep(0.005)


def main() -> None:
    child = Inspected(json.loads(sys.argv[1]))
    print(json.dumps(child.facts()), flush=True)
    child.serve()


if __name__ == "__main__":
    main()
