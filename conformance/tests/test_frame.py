"""Outcomes: five, none silent; whatever a check does, it ends as one of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lmcache_conformance import Inconclusive, NotClaimed, Outcome, Wrong
from lmcache_conformance.builtin import MemoryHarness
from lmcache_conformance.checks import CHECKS
from lmcache_conformance.frame import Check, check, plan, run_check
from lmcache_conformance.rig import Rig
from lmcache_core.sdk import Status


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    harness = MemoryHarness()
    harness.start(tmp_path)
    return Rig(harness, scratch=tmp_path, seed=3)


def made(run: Callable[[Rig], None]) -> Check:
    run.__doc__ = "A rule."
    return check("T1", fix="nothing")(run)


def raising(error: BaseException) -> Callable[[Rig], None]:
    def run(rig: Rig) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Wrong("broken"), Outcome.FAIL),
        (NotClaimed("not declared"), Outcome.NOT_CLAIMED),
        (Inconclusive("no device"), Outcome.INCONCLUSIVE),
        (ZeroDivisionError("odd"), Outcome.FAIL),
        (pytest.skip.Exception("not today"), Outcome.FAIL),
        (SystemExit(0), Outcome.FAIL),
        (KeyboardInterrupt(), Outcome.FAIL),
    ],
)
def test_what_a_check_raises_is_its_outcome(
    rig: Rig, error: BaseException, outcome: Outcome
) -> None:
    result = run_check(made(raising(error)), rig)
    assert result.outcome is outcome
    assert result.reason
    assert result.seed == 3


def test_a_check_that_hangs_fails_and_the_run_goes_on(rig: Rig) -> None:
    hanging = replace(made(lambda rig: time.sleep(30)), limit_s=0.1)
    started_s = time.monotonic()
    result = run_check(hanging, rig)
    assert result.outcome is Outcome.FAIL
    assert "did not return" in result.reason
    assert time.monotonic() - started_s < 5


def test_a_connector_that_fails_to_close_fails_the_check(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_and_spoil(rig: Rig) -> None:
        def refuse() -> None:
            raise OSError("busy")

        monkeypatch.setattr(rig.store, "close", refuse)

    result = run_check(made(open_and_spoil), rig)
    assert (result.outcome, "busy" in result.reason) == (Outcome.FAIL, True)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((s for s in [Status.OK]), "generator"),
        ((Status.OK,), "tuple"),
        ([], "0 answers to 1 keys"),
        ([True], "True"),
        (None, "NoneType"),
    ],
)
def test_an_answer_of_a_wrong_shape_says_what_is_due(
    rig: Rig, answer: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rig.store, "put_from", lambda *call: answer)
    with pytest.raises(Wrong, match=words):
        rig.put({rig.key("k"): b"x" * 64})


def test_every_check_has_an_id_a_rule_and_a_fix_of_its_own() -> None:
    assert len({each.id for each in CHECKS}) == len(CHECKS)
    for each in CHECKS:
        assert each.id[0] in "ABCDEFGHIJKLZP", each.id
        assert len(each.rule) > 30, each.id
        assert len(each.fix) > 10, each.id


def test_the_quick_plan_leaves_out_only_what_says_so() -> None:
    assert plan(CHECKS, full=True) == list(CHECKS)
    left = [each for each in CHECKS if each not in plan(CHECKS, full=False)]
    assert [each.id for each in left] == ["D5"]


def test_a_check_without_a_rule_is_refused() -> None:
    with pytest.raises(TypeError, match="docstring"):
        check("T2", fix="x")(lambda rig: None)
