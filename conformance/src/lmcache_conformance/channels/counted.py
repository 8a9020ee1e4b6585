"""What this process holds: open files, threads, memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

_FDS, _TASKS, _STATM = Path("/proc/self/fd"), Path("/proc/self/task"), Path("/proc/self/statm")
SETTLE_S = 8.0
"""Threads and files of connections that have ended go within it."""


class Counted:
    """The counts when it was made."""

    def __init__(self) -> None:
        self.fds, self.threads, self.rss_bytes = _now()

    def grown(self, *, fds: int = 2, threads: int = 2, rss_bytes: int = 1 << 40) -> str:
        """What has grown by more than this, and does not go; "" when nothing has."""
        end_s = time.monotonic() + SETTLE_S
        while True:
            more = [
                now - then for now, then in zip(_now(), (self.fds, self.threads, self.rss_bytes))
            ]
            allowed = zip(more, (fds, threads, rss_bytes), ("files", "threads", "bytes of memory"))
            grown = [f"{each} more {what}" for each, most, what in allowed if each > most]
            if not grown or time.monotonic() >= end_s:
                return ", ".join(grown)
            time.sleep(0.05)


def _now() -> tuple[int, int, int]:
    rss = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(list(_FDS.iterdir())), len(list(_TASKS.iterdir())), rss
