"""Making a store stand still, by the harness or by the I/O shim."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lmcache_conformance.child import Child
from lmcache_conformance.frame import Inconclusive, NotClaimed
from lmcache_conformance.rig import Rig
from lmcache_conformance.shim import Action
from lmcache_core.sdk import Durability, Sharing


def does_io(rig: Rig, child: Child) -> dict[str, int]:
    """Calls of each kind that one put, get, exists and delete make.

    Raises:
        NotClaimed: none, and the connector claims nothing that outlives its process.
        Inconclusive: none, though it claims so: its library can't be hooked.
    """
    key, size = rig.key("io").hex(), rig.size()
    counted: dict[str, int] = {}
    for op, arguments in (
        ("put", {"seed": 1, "nbytes": size}), ("get", {"nbytes": size}), ("exists", {}),
        ("delete", {}),
    ):  # fmt: skip
        answer = child.call(op, key=key, arm={"action": int(Action.COUNT)}, **arguments)
        for kind, count in answer.get("seen", {}).items():
            counted[kind] = counted.get(kind, 0) + count
    if any(counted.values()):
        return counted
    if rig.claims.sharing is Sharing.PROCESS and rig.claims.durability is Durability.NONE:
        raise NotClaimed("sharing is process, and no I/O was seen in any operation")
    raise Inconclusive("no system call of this library could be hooked")


@contextmanager
def stalled(rig: Rig, child: Child, *, for_s: float) -> Iterator[dict[str, Any] | None]:
    """The store stands still for ``for_s`` seconds; gives what to hand to the child as ``arm``.

    Raises:
        NotClaimed, Inconclusive: see `does_io`.
    """
    if not rig.harness.offers("stall"):
        does_io(rig, child)
        yield {"action": int(Action.STALL), "at": 2, "stall_ms": int(for_s * 1000)}
        return
    lift = threading.Event()
    standing = threading.Event()

    def hold() -> None:
        with rig.harness.stall():
            standing.set()
            lift.wait(for_s)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    standing.wait(5)
    try:
        yield None
    finally:
        lift.set()
        thread.join()
