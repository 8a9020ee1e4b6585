"""One engine of the disaggregation demo: answers orders on stdin, one JSON object a line.

python -m lmcache_core.demo.pd_child '{"model": ..., "connector": ..., "role": ..., "extra": {}}'

Times are `time.monotonic`, which processes of one host share.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from typing import Any

STEP_TOKENS = 512
IDLE_S = 0.0005


class Child:
    """An engine that is stepped all the time, as a server's is."""

    def __init__(self, order: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        options: dict[str, Any] = {
            "max_num_batched_tokens": STEP_TOKENS,
            "enable_prefix_caching": False,
            **order["options"],
        }
        if order["connector"]:
            options["kv_transfer_config"] = KVTransferConfig(
                kv_connector=order["connector"],
                kv_role=order["role"],
                kv_buffer_device="cpu",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config=order["extra"],
            )
        llm = LLM(
            model=order["model"],
            dtype="float32",
            enforce_eager=True,
            max_model_len=4096,
            max_num_seqs=4,
            seed=0,
            **options,
        )
        self._llm = llm
        self.engine = llm.llm_engine
        self._scheduler = self.engine.engine_core.engine_core.scheduler
        self._told: dict[str, dict[str, Any]] = {}
        self._unread = b""
        self._watch_scheduler()

    def facts(self) -> dict[str, Any]:
        """What the driver must know: the channel's address, when there is one."""
        half = getattr(self._scheduler.connector, "scheduler", None)
        cache = getattr(half, "cache", None)
        address = ""
        if cache is not None and hasattr(cache, "engine"):
            from lmcache_core.opening import transport_of

            transport = transport_of(cache.engine)
            address = transport.address if transport is not None else ""
        return {"ready": True, "address": address, "pid": os.getpid()}

    def serve(self) -> None:
        """Until stdin ends."""
        while True:
            busy = self.engine.has_unfinished_requests()
            for line in self._lines(0.0 if busy else IDLE_S):
                if line is None:
                    self.engine.engine_core.shutdown()
                    return
                self._start(json.loads(line))
            for output in self.engine.step():
                self._came(output)

    def _lines(self, timeout_s: float) -> list[str | None]:
        ready, _, _ = select.select([sys.stdin], [], [], timeout_s)
        if not ready:
            return []
        # Not by `readline`, which takes more lines than it gives, unseen by `select`.
        data = os.read(sys.stdin.fileno(), 1 << 16)
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [line.decode() for line in lines] if data else [None]

    def _start(self, order: dict[str, Any]) -> None:
        from vllm import SamplingParams

        if "abort" in order:
            self.engine.abort_request([order["abort"]])
            self._told.pop(order["abort"], None)
            return
        if "metrics" in order:
            half = self._scheduler.connector.scheduler
            print(json.dumps({"metrics": half.cache.metrics.snapshot()}), flush=True)
            return
        name = order["name"]
        params = SamplingParams(
            temperature=0,
            max_tokens=order["tokens"],
            ignore_eos=True,
            extra_args={"kv_transfer_params": order["params"]} if order["params"] else None,
        )
        ids = order.get("ids") or self._llm.get_tokenizer().encode(order["text"])
        ids = ids[: order.get("first", len(ids))]
        self._told[name] = {
            "name": name,
            "added_s": time.monotonic(),
            "prompt_tokens": len(ids),
            "prefilled_tokens": 0,
            "first_step_s": 0.0,
            "first_token_s": 0.0,
        }
        self.engine.add_request(name, {"prompt_token_ids": ids}, params)

    def _came(self, output: Any) -> None:
        told = self._of(output.request_id)
        if told is None:
            return
        if not told["first_token_s"] and output.outputs[0].token_ids:
            told["first_token_s"] = time.monotonic()
        if output.finished:
            told |= {
                "text": output.outputs[0].text,
                "token_ids": list(output.outputs[0].token_ids),
                "kv": output.kv_transfer_params,
                "cached_tokens": output.num_cached_tokens,
                "finish": output.outputs[0].finish_reason,
            }
            del self._told[told["name"]]
            print(json.dumps(told, default=str), flush=True)

    def _of(self, request_id: str) -> dict[str, Any] | None:
        # The engine appends a suffix to the id.
        return next((t for name, t in self._told.items() if request_id.startswith(name)), None)

    def _watch_scheduler(self) -> None:
        original = self._scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            for name, tokens in output.num_scheduled_tokens.items():
                told = self._of(name)
                if told is not None and not told["first_token_s"]:
                    told["first_step_s"] = told["first_step_s"] or time.monotonic()
                    told["prefilled_tokens"] += tokens
            return output

        self._scheduler.schedule = schedule


def main() -> None:
    """Serve the order in ``argv[1]``."""
    child = Child(json.loads(sys.argv[1]))
    print(json.dumps(child.facts()), flush=True)
    child.serve()


if __name__ == "__main__":
    main()
