"""What ends the node server's waiting."""

from __future__ import annotations

import os


class Wake:
    """A file that becomes readable; `set` is safe from threads and signal handlers."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        """Have the next wait, or the current one, return at once."""
        os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """Wait again."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Close the file; nobody may `set` any more."""
        os.close(self.fd)
