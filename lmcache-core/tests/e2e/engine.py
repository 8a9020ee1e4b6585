"""A vLLM engine in a process of its own that stands idle, as a server's, while nobody asks."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from lmcache_core.demo import pd_child


class Idle(pd_child.Child):
    """The demo's engine, but it is stepped only while it has something to do; a prompt may have a
    tenant's ``salt``."""

    def serve(self) -> None:
        while True:
            busy = self.engine.has_unfinished_requests() or self._scheduler.has_requests()
            for line in self._lines(0.0 if busy else 3600.0):
                if line is None:
                    self.engine.engine_core.shutdown()
                    return
                self._start(json.loads(line))
            if self.engine.has_unfinished_requests() or self._scheduler.has_requests():
                for output in self.engine.step():
                    self._came(output)

    def _start(self, order: dict[str, Any]) -> None:
        if "text" not in order:
            super()._start(order)
            return
        from vllm import SamplingParams

        name = order["name"]
        ids = self._llm.get_tokenizer().encode(order["text"])[: order["first"]]
        self._told[name] = {
            "name": name,
            "added_s": time.monotonic(),
            "prompt_tokens": len(ids),
            "ids": ids,
            "prefilled_tokens": 0,
            "first_step_s": 0.0,
            "first_token_s": 0.0,
        }
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if order.get("salt"):
            prompt["cache_salt"] = order["salt"]
        params = SamplingParams(temperature=0, max_tokens=order["tokens"], ignore_eos=True)
        self.engine.add_request(name, prompt, params)


if __name__ == "__main__":
    child = Idle(json.loads(sys.argv[1]))
    print(json.dumps(child.facts()), flush=True)
    child.serve()
