"""What a backend's author gives the suite: a URL, and as many handles on the store as there are.

What a harness does not offer, the suite finds another way or answers INCONCLUSIVE.
"""

from __future__ import annotations

import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from lmcache_conformance.frame import Inconclusive
from lmcache_conformance.proxy import FaultProxy


class Harness(ABC):
    """One backend under test.  Started once a run; every check uses keys of its own.

    Attributes:
        name: of the backend, in the certificate; the URL's scheme when empty.
        module: plugin module, for a backend that is not installed as an entry point.
        scratch: a directory of this run, after `start`.
    """

    name: str = ""
    module: str = ""
    scratch: Path

    def start(self, scratch: Path) -> None:
        """Bring the store up, with its files below ``scratch``."""
        self.scratch = scratch

    @abstractmethod
    def url(self) -> str:
        """What an operator would write; valid after `start`."""

    def stop(self) -> None:
        """Take down what `start` brought up."""
        return

    def direct_url(self) -> str:
        """The store without anything in between, for measurements."""
        return self.url()

    def offers(self, handle: str) -> bool:
        """Whether the optional method ``handle`` is implemented."""
        return getattr(type(self), handle) is not getattr(Harness, handle)

    # The optional handles.

    def kill(self) -> None:
        """SIGKILL the store's server."""
        raise NotImplementedError

    def restart(self) -> None:
        """Start the server again at the same address, on the files that it left."""
        raise NotImplementedError

    def stall(self) -> AbstractContextManager[None]:
        """The store takes and answers nothing, and hangs up nothing, in the ``with`` block."""
        raise NotImplementedError

    def small_url(self, size_bytes: int) -> str:
        """Another store, empty, with room for about ``size_bytes``.

        Raises:
            Inconclusive: this machine can't give one.
        """
        raise NotImplementedError

    def corrupt(self, key: bytes) -> None:
        """Flip one bit in the stored value, behind the connector's back."""
        raise NotImplementedError

    def truncate(self, key: bytes) -> None:
        """Cut the tail of the stored value, behind the connector's back."""
        raise NotImplementedError

    def lose(self, key: bytes) -> None:
        """Remove a part of what the store keeps of the value, as its own eviction may."""
        raise NotImplementedError

    def damages(self) -> Mapping[str, Callable[[bytes], None]]:
        """Further ways to damage what is stored of a key, by what they are called in a message."""
        raise NotImplementedError

    def refusals(self) -> Mapping[str, AbstractContextManager[Collection[str]]]:
        """Ways to make the store refuse with errors of its own, by what they are called.

        Within each the operations that it gives are refused, of: open, exists, get, put, delete,
        scan and health.
        """
        raise NotImplementedError

    def raw_get(self, key: bytes) -> bytes | None:
        """The stored value, read without the connector."""
        raise NotImplementedError

    def raw_put(self, key: bytes, content: bytes) -> None:
        """Store a value without the connector."""
        raise NotImplementedError

    def litter(self) -> None:
        """Leave things that are no values where the values are."""
        raise NotImplementedError

    def stored(self) -> int:
        """How many things the store holds that will not go by themselves; files in `scratch`
        unless told otherwise."""
        return sum(len(files) for _, _, files in os.walk(self.scratch))

    def bad_urls(self) -> list[str]:
        """URLs of this backend that can't be opened here."""
        raise NotImplementedError

    def server_version(self) -> str:
        """Of the store's server, for the certificate."""
        return ""


class TcpHarness(Harness):
    """A store behind one TCP port or unix socket: a fault proxy stands before it for free.

    Attributes:
        proxy: between every connector and the store, after `start`.
    """

    proxy: FaultProxy

    @abstractmethod
    def address(self) -> tuple[str, int] | Path:
        """Where the server listens; constant over restarts."""

    @abstractmethod
    def url_at(self, host: str, port: int) -> str:
        """The URL of the store as it is seen at this address."""

    def start(self, scratch: Path) -> None:
        """Start the proxy; call it when the server listens."""
        super().start(scratch)
        self.proxy = FaultProxy(self.address())

    def stop(self) -> None:
        self.proxy.close()

    def url(self) -> str:
        return self.url_at("127.0.0.1", self.proxy.port)

    def direct_url(self) -> str:
        address = self.address()
        return self.url() if isinstance(address, Path) else self.url_at(*address)

    def stall(self) -> AbstractContextManager[None]:
        return self._stalled()

    @contextmanager
    def _stalled(self) -> Iterator[None]:
        self.proxy.faults.stalled = True
        try:
            yield
        finally:
            self.proxy.faults.stalled = False


def small_disk(folder: Path, size_bytes: int) -> Path:
    """``folder`` as a file system of its own with so much room, for stores that keep files.

    Raises:
        Inconclusive: it takes root.
    """
    if not folder.exists():
        folder.mkdir()
        options = f"size={size_bytes},mode=700"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            folder.rmdir()
            raise Inconclusive(f"a full disk needs root to mount one: {done.stderr.strip()}")
    return folder


def unmount(folder: Path) -> None:
    """Undo `small_disk`."""
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)
