"""A network of this process's own, with loopback only.

Mooncake's clients listen on every interface, and no setting changes that.  Tests and throw-away
servers therefore live in a network namespace that nothing outside can reach.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def is_private() -> bool:
    """Whether loopback is the only interface that there is."""
    return [name for _, name in socket.if_nameindex()] == ["lo"]


@contextlib.contextmanager
def private_network() -> Iterator[None]:
    """Move the calling thread, and what it starts within, to a network of their own.

    Does nothing but to switch loopback on where the network is private already.

    Raises:
        RuntimeError: that is not allowed here; the message says the fix.
    """
    if is_private():
        _loopback_up()
        yield
        return
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if libc.unshare(_CLONE_NEWNET):
            raise RuntimeError(
                "Mooncake's clients listen on every interface, and a network of their own takes "
                f"root ({os.strerror(ctypes.get_errno())}); try: unshare -rn COMMAND"
            )
        try:
            _loopback_up()
            yield
        finally:
            if libc.setns(before, _CLONE_NEWNET):
                raise RuntimeError("the network before can't be entered again")
    finally:
        os.close(before)


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh22x", b"lo", 0)
        flags = struct.unpack_from("h", fcntl.ioctl(sock, _SIOCGIFFLAGS, request), 16)[0]
        if not flags & _IFF_UP:
            fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))
