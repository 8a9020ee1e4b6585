"""The node server's memory, as a worker of an engine maps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lmcache_core.cache import Attached
from lmcache_core.memory.arena import Arena, ArenaError, ArenaRef
from lmcache_core.node.address import Address
from lmcache_core.node.link import greet
from lmcache_core.sdk import LMCacheError


@dataclass(frozen=True, slots=True)
class NodeArena:
    """`lmcache_core.cache.ArenaHandle` of one session of one node server.  Plain values, so it
    can be pickled.

    Attributes:
        incarnation: of the server's process; after a restart the memory is another.
    """

    address: Address
    token_file: str
    session: str
    incarnation: str
    timeout_s: float

    def attach(self, *, warn: Callable[[str], None], prefault: bool) -> Attached:
        """Join the session and map its memory: while this process lives, or until the release,
        the server leaves alone what the session holds.  Blocks for at most ``timeout_s``.

        Raises:
            ArenaError: the server or the session is gone, or the memory can't be mapped.
        """
        try:
            link = greet(
                self.address,
                role="worker",
                session=self.session,
                token_file=self.token_file,
                timeout_s=self.timeout_s,
            )
        except LMCacheError as error:
            raise ArenaError(error.message, op="attach", hint=error.hint) from error
        welcome = link.welcome
        try:
            if welcome.incarnation != self.incarnation:
                raise ArenaError(
                    f"another node server runs at {self.address} now",
                    op="attach",
                    hint="wait for the engine to connect anew",
                )
            ref = ArenaRef(*welcome.arena)
            if link.fd >= 0:
                fd, link.fd = link.fd, -1
                arena = Arena.from_fd(fd, ref.nbytes, warn=warn, prefault=prefault)
            else:
                arena = Arena.attach(ref, warn=warn, prefault=prefault)
        except BaseException:
            link.close()
            raise

        def release() -> None:
            arena.close()
            link.close()

        return Attached(arena, release)
