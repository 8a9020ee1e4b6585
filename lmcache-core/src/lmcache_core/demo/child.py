"""One process of the demo: an engine, some questions, a JSON file with what happened.

python -m lmcache_core.demo.child '{"model": ..., "tiers": [...], "questions": [...], "out": ...}'
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from lmcache_core.demo.models import document_text

ANSWER_TOKENS = 24
CHUNK_TOKENS = 256


class Session:
    """A vLLM engine stepped by hand, so that time and work of one request are exact."""

    def __init__(self, model: str, tiers: list[dict[str, str]]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        options: dict[str, Any] = {}
        if tiers:
            options["kv_transfer_config"] = KVTransferConfig(
                kv_connector="LMCacheCoreConnector",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config={"chunk_size": CHUNK_TOKENS, "tiers": tiers},
            )
        llm = LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            max_model_len=4096,
            max_num_seqs=4,
            max_num_batched_tokens=4096,
            enable_prefix_caching=False,
            seed=0,
            **options,
        )
        self.engine = llm.llm_engine
        self.tokenizer = llm.get_tokenizer()
        self._scheduler = self.engine.engine_core.engine_core.scheduler
        self._count = 0
        self._prefilled = 0
        self._watched = ""
        self._watch_scheduler()

    def document(self) -> list[int]:
        """Token ids of the document, cut to a whole number of chunks."""
        ids: list[int] = self.tokenizer.encode(document_text())
        return ids[: len(ids) // CHUNK_TOKENS * CHUNK_TOKENS]

    def ask(self, ids: list[int], tokens: int = ANSWER_TOKENS) -> dict[str, Any]:
        """Run one request to its end; TTFT is from add_request to the first token."""
        from vllm import SamplingParams

        self._count += 1
        name = f"demo-{self._count}"
        self._prefilled = 0
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        start, ttft_s, last = time.perf_counter(), 0.0, None
        # The engine appends a suffix to the id; the prefix still finds the request.
        self._watched = name
        self.engine.add_request(name, {"prompt_token_ids": ids}, params)
        while self.engine.has_unfinished_requests():
            outputs: Any = self.engine.step()
            if not outputs:
                time.sleep(0.001)
            for output in outputs:
                if not ttft_s and output.outputs[0].token_ids:
                    ttft_s = time.perf_counter() - start
                    self._watched = ""
                last = output
        assert last is not None
        transfer = (last.kv_transfer_params or {}).get("lmcache", {})
        return {
            "ttft_s": ttft_s,
            "prompt_tokens": len(ids),
            "prefilled_tokens": self._prefilled,
            "cached_tokens": transfer.get("cached_tokens", {}),
            "text": last.outputs[0].text,
            "token_ids": list(last.outputs[0].token_ids),
        }

    def settle(self) -> None:
        """Let stores reach the disk, as they would while the next requests run."""
        for _ in range(3):
            self.ask(self.tokenizer.encode("While we wait, count to ten."), 4)
            time.sleep(0.3)

    def close(self) -> None:
        """Shut the engine down; the connector flushes."""
        self.engine.engine_core.shutdown()

    def _watch_scheduler(self) -> None:
        """Count what the engine's own scheduler gives the watched request to prefill."""
        original = self._scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            for name, tokens in output.num_scheduled_tokens.items():
                if self._watched and name.startswith(self._watched):
                    self._prefilled += tokens
            return output

        self._scheduler.schedule = schedule


def main() -> None:
    """Ask the questions of the order in ``argv[1]``."""
    order = json.loads(sys.argv[1])
    session = Session(order["model"], order["tiers"])
    document = session.document()
    session.ask(session.tokenizer.encode("A warm-up that shares nothing with the document."), 2)
    results = []
    for question in order["questions"]:
        ids = session.tokenizer.encode(question, add_special_tokens=False)
        answer = session.ask(document + ids)
        session.settle()
        results.append({**answer, "shared_tokens": len(document), "question_tokens": len(ids)})
    session.close()
    out = Path(order["out"])
    out.with_suffix(".part").write_text(json.dumps(results))
    out.with_suffix(".part").rename(out)


if __name__ == "__main__":
    main()
