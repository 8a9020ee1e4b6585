"""T: channels.  Each check is a function of a `ChannelRig`."""

from __future__ import annotations

from lmcache_conformance.channels import failing, guarding, living, meeting, moving
from lmcache_conformance.frame import Check

CHANNEL_CHECKS: tuple[Check, ...] = tuple(
    sorted(
        (
            each
            for module in (moving, guarding, failing, meeting, living)
            for each in vars(module).values()
            if isinstance(each, Check)
        ),
        key=lambda each: int(each.id[1:]),
    )
)
"""In the order in which they run."""
