"""A large fleet stays quick, and a page that is left open stays small."""

from __future__ import annotations

from browser import Page
from canned import history, instance, job
from pd_proxy_rig import until
from stub import World

KINDS = ("copy", "clear", "move", "compress")


def test_a_hundred_instances_and_a_thousand_jobs(page: Page, world: World) -> None:
    world.instances = [instance(f"engine-{at:03d}", at) for at in range(100)]
    world.jobs = [
        job(at, KINDS[at % 4], "running" if at % 3 == 0 else "done") for at in range(1000)
    ]
    world.history = history(points=20_000)
    page.sign_in()
    page.fill("#job-limit", "1000")
    until(lambda: page.text("#jobs .count") == "1,000, 334 running")
    assert len(page.all("#instances tbody tr")) == 100
    page.js("""
        window.longest = 0;
        const note = entry => (longest = Math.max(longest, entry.duration));
        new PerformanceObserver(l => l.getEntries().forEach(note)).observe({type: "longtask"});
    """)
    for _ in range(4):
        world.step(0.05)
        world.instances = [instance(i.name, at + 1) for at, i in enumerate(world.instances)]
        page.refresh()
    longest = page.js("return window.longest")
    assert longest < 600, f"the page did not answer for {longest:.0f} ms"
    page.fill("#filter", "engine-07")
    assert len(page.all("#instances tbody tr")) == 10


def test_memory_is_bounded(board: Page, world: World) -> None:
    def live() -> tuple[int, float]:
        board.cdp("HeapProfiler.collectGarbage")
        nodes = board.cdp("Memory.getDOMCounters")["nodes"]
        return nodes, board.cdp("Runtime.getHeapUsage")["usedSize"] / 1e6

    def pass_a_while(rounds: int) -> None:
        for _ in range(rounds):
            world.jobs = [world.start("copy"), *world.jobs][:50]
            world.history = history(points=360)
            world.step(0.3)
            board.refresh()

    pass_a_while(15)
    nodes, megabytes = live()
    pass_a_while(40)
    later_nodes, later_megabytes = live()
    assert later_nodes < nodes * 1.1 + 200
    assert later_megabytes < megabytes + 1.5
