"""What goes from one instance to another takes a small part of their host memory at a time."""

from __future__ import annotations

from controller_ops import SERVED, ask, greeted, place
from controller_rig import rig, tier

from lmcache_core.agent import wire


def test_a_slice_fits_into_the_smaller_host_tier() -> None:
    """Chunks of 1,000 bytes: 4 of them are an eighth of 32,000 bytes."""
    keys = [SERVED.tag + n.to_bytes(32, "big") + bytes(6) for n in range(10)]
    small = (tier("host", capacity_bytes=32_000), tier("disk"))
    with rig() as made:
        giver = greeted(made, "giver")
        greeted(made, "taker", status={"channel": "tcp://taker:1", "tiers": small})
        giver.stores("disk", keys)
        job = ask(
            made, "copy", select={"model": "m"},
            source=place("giver", "disk"), target=place("taker", "host"),
        )  # fmt: skip
        assert len(job.parts) == 9, "three slices of three parts"
        (hold,) = giver.take()
        assert isinstance(hold, wire.Copy) and len(wire.split(hold.keys)) == 4
