"""The process behind `Peer`: a side of a channel, driven by lines of JSON."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from typing import Any

from lmcache_conformance.channels.sides import Side, Source, Stream
from lmcache_core.sdk import Access


class Main:
    """Each method is a request; its result is the answer."""

    def __init__(self) -> None:
        self._side: Side
        self._streams: list[Stream] = []

    def open(self, url: str, plugin: str, secret: str, nbytes: int) -> dict[str, Any]:
        """Open the channel and register memory."""
        source = Source(url, plugin)
        self._side = Side(source, secret=bytes.fromhex(secret), nbytes=nbytes)
        return {"metadata": self._side.channel.metadata().hex()}

    def connect(self, metadata: str) -> dict[str, Any]:
        """Reach a peer."""
        return {"peer": self._side.connect(bytes.fromhex(metadata))}

    def notify(self, peer: str, message: str) -> dict[str, Any]:
        """Send a notification."""
        return {"status": self._side.channel.notify(peer, message.encode()).name}

    def has(self, message: str) -> dict[str, Any]:
        """Wait for a notification; who sent it."""
        return {"peer": self._side.has(message.encode())}

    def grant(self, peer: str, offset: int, nbytes: int, access: str) -> dict[str, Any]:
        """Grant one span."""
        made = self._side.grant(peer, (offset, nbytes), access=Access(access))
        return {"ticket": made.ticket.hex()}

    def fill(self, seed: int) -> dict[str, Any]:
        """Fill the memory."""
        self._side.arena.fill(seed)
        return {}

    def digest(self, offset: int, nbytes: int) -> dict[str, Any]:
        """SHA-256 of a part of the memory."""
        return {"digest": hashlib.sha256(self._side.arena.bytes_at(offset, nbytes)).hexdigest()}

    def move(self, peer: str, ticket: str, pieces: list[list[int]], reads: bool) -> dict[str, Any]:
        """One transfer."""
        parts = [(a, b, c, d) for a, b, c, d in pieces]
        found = self._side.move(peer, bytes.fromhex(ticket), parts, reads=reads)
        return {"answers": [each.name for each in found]}

    def stream(self, peer: str, ticket: str, nbytes: int, seconds: float) -> dict[str, Any]:
        """Write again and again, in the background."""
        self._streams.append(Stream(self._side, peer, bytes.fromhex(ticket), nbytes, seconds))
        return {}


def main() -> None:
    """Answer requests until there are no more."""
    served = Main()
    # A native library may print where it likes; the answers have a stream of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(served, request.pop("op"))(**request)
        except Exception as error:  # told to the check
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
