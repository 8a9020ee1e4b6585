"""For tests only: keeps a real server in a network namespace of its own, and relays to it.

    python -m lmcache_backend_infinistore.warden BUILD BLOCK_KIB < commands

The server listens on 0.0.0.0 and wants an RDMA device.  So this process listens on 127.0.0.1, then
enters a new namespace that has a loopback only, and starts the server there over a stub of the
verbs library (fakeverbs.c, built in BUILD).  Commands are lines: start, kill, freeze, resume; each
is answered by a line.  When the commands end, it kills the server and ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

SERVICE_PORT, MANAGE_PORT = 22345, 18080
START_LIMIT_S = 20.0
_LAUNCH = """
import infinistore.server as server
server.prevent_oom = lambda: None  # it asks for what a container may not
server.main()
"""
_CLONE_NEWNET, _CLONE_NEWUSER = 0x40000000, 0x10000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_PR_SET_PDEATHSIG = 1
_RELAY_BYTES = 256 << 10
_libc = ctypes.CDLL(None, use_errno=True)


class Warden:
    """The server's process; commands are methods.

    Args:
        build: directory for the stub.
        block_kib: ``--minimal-allocate-size`` of the server.
    """

    def __init__(self, build: Path, block_kib: int) -> None:
        self._stub = built(build)
        self._block_kib = block_kib
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Start it; returns when it listens."""
        # fmt: off
        command = [
            sys.executable, "-c", _LAUNCH, "--service-port", str(SERVICE_PORT),
            "--manage-port", str(MANAGE_PORT), "--prealloc-size", "1",
            "--minimal-allocate-size", str(self._block_kib), "--log-level", "warning",
        ]
        # fmt: on
        self._server = subprocess.Popen(
            command,
            env={**os.environ, "LD_PRELOAD": str(self._stub)},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            preexec_fn=_die_with_parent,
        )
        end_s = time.monotonic() + START_LIMIT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", SERVICE_PORT), timeout=1).close()
                return f"ok {self._server.pid}"
            except OSError:
                if self._server.poll() is not None or time.monotonic() > end_s:
                    return "the server did not start"
                time.sleep(0.02)

    def kill(self) -> str:
        """SIGKILL, as a crash."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None
        return "ok"

    def freeze(self) -> str:
        """SIGSTOP: connections stay open, nothing is answered from here on."""
        return self._signal(signal.SIGSTOP)

    def resume(self) -> str:
        """SIGCONT."""
        return self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> str:
        if self._server is None:
            return "no server runs"
        self._server.send_signal(number)
        if number == signal.SIGSTOP:
            # Until then its other threads may run on, on a busy machine for long.
            os.waitid(os.P_PID, self._server.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return "ok"


def built(directory: Path) -> Path:
    """The stub, compiled into ``directory``.

    Raises:
        RuntimeError: no C compiler, or it fails.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("no C compiler; try: apt-get install gcc")
    source, library = Path(__file__).with_name("fakeverbs.c"), directory / "fakeverbs.so"
    command = [compiler, "-O1", "-w", "-shared", "-fPIC", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"fakeverbs.c does not compile: {done.stderr[-500:]}")
    library.chmod(0o600)
    return library


def enter_new_namespace() -> None:
    """This thread, and those it starts, see a loopback of their own and no other network.

    Raises:
        OSError: the system does not allow it.
    """
    if _libc.unshare(_CLONE_NEWNET) and _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "no network namespace of its own: run as root")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _IFF_UP))


def relay(listener: socket.socket) -> None:
    """Forward every connection to the server, wherever this thread's network is."""
    while True:
        client, _ = listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", SERVICE_PORT), timeout=5)
        except OSError:
            client.close()
            continue
        threading.Thread(target=_relay_one, args=(client, server), daemon=True).start()


def _relay_one(client: socket.socket, server: socket.socket) -> None:
    """Forward both ways until one side hangs up; then both are closed, whatever is unread."""
    with client, server:
        for sock in (client, server):
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=_forward, args=(server, client), daemon=True)
        back.start()
        _forward(client, server)
        back.join()


def _forward(source: socket.socket, sink: socket.socket) -> None:
    room = memoryview(bytearray(_RELAY_BYTES))
    try:
        while count := source.recv_into(room):
            sink.sendall(room[:count])
            # What the client should acknowledge at once is acknowledged here.
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    except OSError:
        pass
    for sock in (source, sink):
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other direction did it


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """See above."""
    listener = socket.create_server(("127.0.0.1", 0))
    try:
        enter_new_namespace()
        warden = Warden(Path(sys.argv[1]), int(sys.argv[2]))
    except (OSError, RuntimeError) as error:
        print(error, flush=True)
        return
    threading.Thread(target=relay, args=(listener,), daemon=True).start()
    print(f"ok {listener.getsockname()[1]}", flush=True)
    commands = {
        "start": warden.start, "kill": warden.kill, "freeze": warden.freeze,
        "resume": warden.resume,
    }  # fmt: skip
    for line in sys.stdin:
        print(commands[line.strip()](), flush=True)
    warden.kill()


if __name__ == "__main__":
    main()
