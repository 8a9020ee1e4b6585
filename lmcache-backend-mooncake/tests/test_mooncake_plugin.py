"""The control plane: options, what is missing, what the process is spared."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from mooncake_support import DEFAULTS, Open, helper_pid, settings, until

from lmcache_backend_mooncake import library, plugin
from lmcache_backend_mooncake.codes import Code, deleted, name_of, status_of
from lmcache_backend_mooncake.network import is_private, private_network
from lmcache_backend_mooncake.server import MooncakeServer
from lmcache_conformance.rig import Host
from lmcache_core import plugins
from lmcache_core.sdk import BackendUnavailable, ConfigError, Status

MIB = 1 << 20


def open_url(url: str) -> None:
    plugins.open_connector(url, Host(Path(tempfile.gettempdir())).services).close()


@pytest.mark.parametrize(
    "url, hint",
    [
        ("mooncake://127.0.0.1", "master_host:port"),
        ("mooncake://:50051", "master_host:port"),
        ("mooncake://127.0.0.1:many", "master_host:port"),
        ("mooncake://user:secret@127.0.0.1:1", "master_host:port"),
        ("mooncake://127.0.0.1:1/path", "master_host:port"),
        ("mooncake://127.0.0.1:1?replicas=0", "1 to 64"),
        ("mooncake://127.0.0.1:1?max_concurrency=65", "1 to 64"),
        ("mooncake://127.0.0.1:1?segment_bytes=4096", "at least"),
        ("mooncake://127.0.0.1:1?ssd_offload_path=/nvme", "segment_bytes"),
        ("mooncake://127.0.0.1:1?pin=firm", "none"),
        ("mooncake://127.0.0.1:1?protocol=udp", "tcp"),
        ("mooncake://127.0.0.1:1?no_such=1", ""),
    ],
)
def test_what_can_not_work_is_a_config_error(url: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        open_url(url)
    assert hint in f"{raised.value.hint} {raised.value.message}"
    assert raised.value.hint and "secret" not in str(raised.value)


def test_no_master_is_unavailable_with_the_fix() -> None:
    with pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1:1") as raised:
        open_url("mooncake://127.0.0.1:1")
    assert "mooncake_master" in raised.value.hint
    probe = plugin.lmcache_probe("mooncake://127.0.0.1:1", DEFAULTS)
    assert not probe.usable and "mooncake_master" in probe.hint


def test_without_the_extra_one_error_gives_the_line_to_run(monkeypatch: Any) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "mooncake" else find(name, *a)
    )
    line = "pip install 'lmcache-backend-mooncake[cpu]'"
    probe = plugin.lmcache_probe("mooncake://", DEFAULTS)
    assert not probe.usable and line in probe.hint
    with pytest.raises(ConfigError) as raised:
        open_url("mooncake://127.0.0.1:1")
    assert line in raised.value.hint


def test_without_libibverbs_the_error_names_the_package(monkeypatch: Any) -> None:
    find = ctypes.util.find_library
    monkeypatch.setattr(
        ctypes.util, "find_library", lambda name: None if name == "ibverbs" else find(name)
    )
    probe = plugin.lmcache_probe("mooncake://", DEFAULTS)
    assert not probe.usable and probe.hint == "apt-get install libibverbs1"
    with pytest.raises(ConfigError) as raised:
        open_url("mooncake://127.0.0.1:1")
    assert raised.value.hint == "apt-get install libibverbs1"


def test_import_errors_of_the_helper_have_their_cure() -> None:
    assert "libibverbs1" in library.hint_of("libibverbs.so.1: cannot open shared object file")
    assert "[cpu]" in library.hint_of("libcudart.so.12: cannot open shared object file")
    assert "[cpu]" in library.hint_of("No module named 'mooncake'")


def test_the_native_codes_in_one_table() -> None:
    assert status_of(4096) is Status.OK and status_of(-12345) is Status.FAILED
    assert status_of(Code.NO_AVAILABLE_HANDLE) is Status.REJECTED
    assert status_of(Code.TRANSFER_FAIL) is Status.FAILED, "no MISS: it may be there"
    assert deleted(Code.OBJECT_NOT_FOUND) is Status.OK
    assert deleted(Code.REPLICA_IS_NOT_READY) is Status.FAILED, "a put may still end"
    assert name_of(-900) == "RPC_FAIL (-900)" and name_of(-1) == "code -1"


def test_options_are_typed_and_told() -> None:
    assert settings("mooncake://h:1").master == ("h", 1)
    assert all(option.help for option in plugin.OPTIONS)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert all(f"`{option.name}`" in readme for option in plugin.OPTIONS)


def test_this_process_loads_and_listens_to_nothing(
    shared_server: MooncakeServer, opened: Open
) -> None:
    each = opened(shared_server.url)
    maps = Path("/proc/self/maps").read_text()
    assert "mooncake/store.so" not in maps
    assert "mooncake/store.so" in Path(f"/proc/{helper_pid(each)}/maps").read_text()
    assert not listeners(os.getpid())
    # Why the helper exists, and why tests live in a network of their own.
    assert any(not address.startswith("127.") for address in listeners(helper_pid(each)))
    assert is_private()


def test_the_master_binds_loopback_only(shared_server: MooncakeServer) -> None:
    found = listeners(shared_server.pid)
    assert found and all(address.startswith("127.") for address in found)


def test_the_helper_ends_with_a_killed_process(shared_server: MooncakeServer) -> None:
    code = (
        "import sys, os\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from mooncake_support import connect, helper_pid\n"
        f"print(helper_pid(connect({shared_server.url!r})), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    pid = int(done.stdout)
    assert done.returncode == -9
    until(lambda: gone(pid), 30, "the helper lives on")


def test_a_ctrl_c_for_this_process_is_not_for_the_helper(
    shared_server: MooncakeServer, opened: Open
) -> None:
    """A group of its own, but no session: the kernel may share out the processors by those."""
    pid = helper_pid(opened(shared_server.url))
    assert os.getpgid(pid) == pid and os.getsid(pid) == os.getsid(0)


def test_the_throw_away_store_of_the_command_line() -> None:
    code = (
        "import sys; from lmcache_core import plugins\n"
        "probe = plugins.probe(sys.argv[1]); print(probe.usable, probe.reason)"
    )
    command = ["-m", "lmcache_backend_mooncake.server", sys.executable, "-c", code, "{url}"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True")


def test_a_network_of_its_own_is_left_again() -> None:
    before = os.readlink("/proc/thread-self/ns/net")
    with private_network():
        assert is_private()
    assert os.readlink("/proc/thread-self/ns/net") == before


def gone(pid: int) -> bool:
    try:
        return ") Z" in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def listeners(pid: int) -> list[str]:
    """Local addresses that ``pid`` listens on, as text."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            inodes.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                host = fields[1].partition(":")[0]
                octets = [str(byte) for byte in reversed(bytes.fromhex(host))]
                found.append(".".join(octets) if table == "tcp" else host)
    return found
