"""The API against its own OpenAPI document, by schemathesis."""

from __future__ import annotations

import pytest
from controller_rig import LIMIT_S, TOKEN, keys_of, model, prompt, rig

schemathesis = pytest.importorskip("schemathesis")

SERVED = model()
EXAMPLES = 40
"""Of each operation."""


@pytest.mark.slow
def test_every_answer_is_as_the_document_says() -> None:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    # What selects nothing, or in two ways, is of the right shape and refused all the same.  504 is
    # an instance's silence; a bug would be counted.
    excluded = [positive_data_acceptance, not_a_server_error]

    with rig(question_timeout_s=0.05, max_live_jobs=100_000, max_pins=100_000) as made:
        instance = made.instance(
            models=(SERVED,), status={"tokenizer": True, "channel": "tcp://i0:1"}
        )
        instance.sync()
        instance.stores("host", keys_of(SERVED, prompt(3)))
        schema = schemathesis.openapi.from_url(f"{made.url}/openapi.json", timeout=LIMIT_S)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        failures = []
        tried = 0
        for found in schema.get_all_operations():
            operation = found.ok()
            if operation.path in ("/v1/sync", "/v1/where", "/openapi.json"):
                continue  # msgpack: see test_controller_instances
            for mode in schemathesis.GenerationMode:
                strategy = operation.as_strategy(generation_mode=mode)

                @settings(
                    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )  # fmt: skip
                @given(case=strategy)
                def check(case: object) -> None:
                    nonlocal tried
                    tried += 1
                    case.call_and_validate(  # type: ignore[attr-defined]
                        headers=headers, timeout=LIMIT_S, excluded_checks=excluded
                    )

                try:
                    check()
                except Unsatisfiable:
                    continue  # such as a wrong request where nothing is given
                except Exception as error:
                    failures.append(f"{operation.label} {mode}: {error}")
        assert not failures, "\n\n".join(failures)
        assert tried > 20 * EXAMPLES
        assert made.get("/v1/health")["instances"] == 1
        assert made.controller.counts["internal_error"] == 0
