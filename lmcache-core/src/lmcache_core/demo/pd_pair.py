"""Two engines in processes of their own, a prefiller and a decoder, asked as a proxy asks them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

START_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 180.0
CHUNK_TOKENS = 128
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    # For vLLM's own NixlConnector; shared memory, as on one host.
    "UCX_NET_DEVICES": "lo",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
}


class Engine:
    """One process of `lmcache_core.demo.pd_child`; its log goes to a file.

    Args:
        extra: of the connector's configuration.
        options: of the `LLM`.
        program: another than `pd_child`, that takes the same orders.
    """

    def __init__(
        self,
        log: Path,
        model: str,
        *,
        connector: str = "",
        role: str = "",
        extra: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        program: Sequence[str] = ("-m", "lmcache_core.demo.pd_child"),
        side_port: int = 0,
    ) -> None:
        order = {
            "model": model,
            "connector": connector,
            "role": role,
            "extra": extra or {},
            "options": options or {},
        }
        environment = {**os.environ, **ENVIRONMENT}
        if side_port:
            environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(side_port)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._file = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, *program, json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._file,
            env=environment,
            text=True,
            bufsize=1,
        )
        self._told: dict[str, dict[str, Any]] = {}
        self._facts: dict[str, Any] = {}
        self._unread = b""

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def address(self) -> str:
        """Of the engine's channel; waits for its start."""
        while not self._facts:
            self._facts = self._line(START_TIMEOUT_S)
        return str(self._facts["address"])

    def ask(self, name: str, **order: Any) -> None:
        """Start a request; the answer is `answer`'s."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"name": name, **order}) + "\n")
        self._process.stdin.flush()

    def answer(self, name: str, timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """Of request ``name``.

        Raises:
            TimeoutError: it does not come.
            EOFError: the process ended.
        """
        end_s = time.monotonic() + timeout_s
        while name not in self._told:
            told = self._line(end_s - time.monotonic())
            self._told[str(told.get("name", "metrics"))] = told
        return self._told.pop(name)

    def metrics(self) -> dict[str, float]:
        """What the cache has counted."""
        self.ask("metrics", metrics=True)
        return dict(self.answer("metrics")["metrics"])

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def end(self) -> None:
        """Have the process end, without waiting for it."""
        stdin: IO[str] | None = self._process.stdin
        if stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                stdin.close()

    def close(self) -> None:
        """End the process."""
        self.end()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._file.close()

    def _line(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        end_s = time.monotonic() + timeout_s
        while True:
            while b"\n" in self._unread:
                line, self._unread = self._unread.split(b"\n", 1)
                if line.startswith(b"{"):
                    return dict(json.loads(line))
            # Not by `readline`, which takes more lines than it gives, unseen by `select`.
            ready, _, _ = select.select([pipe], [], [], max(0.0, end_s - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no answer within {timeout_s:.0f} s; see {self.log}")
            data = os.read(pipe, 1 << 16)
            if not data:
                raise EOFError(f"the engine ended; see {self.log}")
            self._unread += data


class Pair:
    """A prefiller and a decoder.

    Args:
        logs: directory for their logs.
        channel: of our connector; "" takes vLLM's own NixlConnector.
        extra: more settings of both.
    """

    def __init__(
        self, logs: Path, model: str, *, channel: str = "tcp", extra: dict[str, Any] | None = None
    ) -> None:
        self.ours = bool(channel)
        self._count = 0
        name = "LMCacheCoreConnector" if self.ours else "NixlConnector"
        settings: dict[str, Any] = {}
        if self.ours:
            token = logs / "pd-token"
            logs.mkdir(parents=True, exist_ok=True)
            token.unlink(missing_ok=True)
            token.touch(0o600)
            token.write_text(secrets.token_hex(32))
            settings = {
                "chunk_size": CHUNK_TOKENS,
                "host_bytes": "1GiB",
                "channel": f"{channel}://127.0.0.1:0",
                "channel_token_file": str(token),
                **(extra or {}),
            }
        label = channel.replace("+", "-") or "vllm-nixl"
        self.prefiller, self.decoder = (
            Engine(
                logs / f"pd-{label}-{role}.log",
                model,
                connector=name,
                role=f"kv_{role}",
                extra=settings,
                side_port=0 if self.ours else _free_port(),
            )
            for role in ("producer", "consumer")
        )

    def ask(self, prompt: dict[str, Any], tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """One request through both; what the prefiller and the decoder told."""
        self._count += 1
        name = f"pd-{self._count}-{secrets.token_hex(4)}"
        if self.ours:
            decoder = self.decoder.address
            self.start_both(name, prompt, tokens, decoder)
            return self.prefiller.answer(name), self.decoder.answer(name)
        # vLLM's pulls: the decoder is asked when the prefiller has answered.
        asked = {"do_remote_decode": True, "do_remote_prefill": False}
        self.prefiller.ask(name, **prompt, tokens=1, params=asked)
        prefilled = self.prefiller.answer(name)
        self.decoder.ask(name, **prompt, tokens=tokens, params=prefilled["kv"])
        return prefilled, self.decoder.answer(name)

    def start_both(self, name: str, prompt: dict[str, Any], tokens: int, decoder: str) -> None:
        """Send the request to both at once, as the proxy does."""
        wish = {"transfer_id": name}
        self.decoder.ask(
            name, **prompt, tokens=tokens, params={"lmcache": {"role": "decode", **wish}}
        )
        prefill = {"role": "prefill", "decoder": decoder, **wish}
        self.prefiller.ask(name, **prompt, tokens=1, params={"lmcache": prefill})

    def close(self) -> None:
        """End both processes."""
        for engine in (self.prefiller, self.decoder):
            engine.close()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
