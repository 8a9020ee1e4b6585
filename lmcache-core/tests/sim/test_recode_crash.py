"""A process that ends at the n-th file operation while chunks change their form, for every n: the
chunk is there in one form or the other, and gives the right bytes."""

from __future__ import annotations

import pytest
from test_simulation import CHUNK, CheckedPages, Simulation
from world import Crash

TOKENS = [t for t in (0, 1, 2) for _ in range(CHUNK)]


def stored(simulation: Simulation, codec: str) -> None:
    """Three chunks on disk, in the other form than ``codec`` is."""
    simulation.engine.store(TOKENS, CheckedPages(TOKENS))
    assert simulation.engine.flush(5.0)
    recoded(simulation, "" if codec else "toy")


def recoded(simulation: Simulation, codec: str) -> None:
    order = simulation.engine.compress(TOKENS, tier="disk", codec=codec)
    for _ in range(500):
        if order.done:
            break
        simulation.runtime.wait(0.01)
        simulation.engine.poll()
    assert order.done
    assert not order.failed, order.failed


@pytest.mark.parametrize("power", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize("codec", ["toy", ""], ids=["compress", "decompress"])
def test_a_chunk_is_there_in_one_form_or_the_other(codec: str, power: bool) -> None:
    for number in range(200):
        simulation = Simulation(seed=number, durability="host")
        stored(simulation, codec)
        simulation.disk.crash_after(number)
        try:
            recoded(simulation, codec)
            ended = True
        except Crash:
            ended = False
        simulation.disk.fault = lambda op: None
        simulation.disk.crash(power=power)
        simulation.remote._values.clear()
        simulation.restarts += 1
        simulation.engine = simulation.start()
        found = simulation.engine.retrieve(TOKENS, CheckedPages(TOKENS))
        assert found == len(TOKENS), f"lost at file operation {number}"
        if ended:
            assert number > 10, "too few operations to mean something"
            return
    raise AssertionError("it never came to its end")
