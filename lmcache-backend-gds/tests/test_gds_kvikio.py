"""The real kvikio on a libcuda without a device, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gds_support import KIB, MIB, file_of, get, needs_kvikio, put, values_below

from lmcache_conformance import value
from lmcache_conformance.child import Child, digest
from lmcache_conformance.shim import Action, mask_of
from lmcache_core.connectors.file import FileConnector

pytestmark = needs_kvikio

Start = Callable[[str], Child]
KEY = b"key"
QUERIES = ("io=kvikio", "io=kvikio&direct=1", "io=kvikio&task_size_bytes=65536&queue_depth=3")


def asked(child: Child, op: str, key: bytes = KEY, **arguments: Any) -> dict[str, Any]:
    return child.call(op, key=key.hex(), **arguments)


@pytest.mark.parametrize("query", QUERIES)
def test_kvikio_and_file_read_each_others_values(tmp_path: Path, child: Start, query: str) -> None:
    kvikio, theirs = child(f"gds://{tmp_path}/kv?{query}"), FileConnector(f"{tmp_path}/kv")
    for size in (4096, 64 * KIB, 3 * MIB, 9 * MIB):
        assert asked(kvikio, "put", seed=size, nbytes=size)["status"] == "OK"
        assert get(theirs, KEY, size)[1] == value(size, size)
        put(theirs, b"theirs", value(size + 1, size))
        found = asked(kvikio, "get", b"theirs", nbytes=size)
        assert found["digest"] == digest(value(size + 1, size)) and found["canaries"]
    assert file_of(tmp_path / "kv", KEY).stat().st_mode & 0o777 == 0o600
    theirs.close()


@pytest.mark.parametrize("query", QUERIES)
def test_values_of_odd_sizes(tmp_path: Path, child: Start, query: str) -> None:
    """Under direct a target is whole pages, and what file:// wrote need not be."""
    kvikio, theirs = child(f"gds://{tmp_path}/kv?{query}"), FileConnector(f"{tmp_path}/kv")
    for size in (0, 1, 4095, 4097, 5 * MIB + 3):
        put(theirs, KEY, value(size, size))
        found = asked(kvikio, "get", nbytes=-(-size // 4096) * 4096 or 4096)
        assert (found["status"], found["nbytes"]) == ("OK", size)
        assert found["digest"] == digest(value(size, size)) and found["canaries"]
    theirs.close()


def test_every_byte_goes_through_kvikio(tmp_path: Path, child: Start) -> None:
    """The shim sees pwrite and pread of parts, which Python's own calls would not make."""
    kvikio = child(f"gds://{tmp_path}/kv?io=kvikio&task_size_bytes=65536")
    count = {"action": int(Action.COUNT)}
    assert asked(kvikio, "put", seed=1, nbytes=MIB, arm=count)["seen"]["write"] == 16
    assert asked(kvikio, "get", nbytes=MIB, arm=count)["seen"]["read"] == 16


def test_a_missing_file_is_a_miss_and_a_small_target_learns_the_size(
    tmp_path: Path, child: Start
) -> None:
    kvikio = child(f"gds://{tmp_path}/kv?io=kvikio")
    assert asked(kvikio, "get", nbytes=100)["status"] == "MISS"
    assert asked(kvikio, "delete")["status"] == "OK"
    asked(kvikio, "put", seed=1, nbytes=5000)
    found = asked(kvikio, "get", nbytes=4999)
    assert (found["status"], found["nbytes"]) == ("SIZE_MISMATCH", 5000)


def test_a_file_that_ends_early_fails_and_is_not_ok(tmp_path: Path, child: Start) -> None:
    """Cut while the read stands still: its size was known, its end came before."""
    kvikio = child(f"gds://{tmp_path}/kv?io=kvikio")
    asked(kvikio, "put", seed=1, nbytes=MIB)
    arm = {"action": int(Action.STALL), "at": 1, "mask": mask_of("read"), "stall_ms": 600}
    pending = kvikio.later("get", key=KEY.hex(), nbytes=MIB, arm=arm)
    time.sleep(0.3)
    path = file_of(tmp_path / "kv", KEY)
    path.write_bytes(path.read_bytes()[: MIB // 2])
    assert pending.result()["status"] == "FAILED"
    assert asked(kvikio, "get", nbytes=MIB)["digest"] == digest(value(1, MIB)[: MIB // 2])


def test_a_full_disk_rejects_and_leaves_nothing(small: Path, child: Start) -> None:
    kvikio = child(f"gds://{small}/kv?io=kvikio")
    assert asked(kvikio, "put", seed=1, nbytes=3 * MIB)["status"] == "OK"
    for key in (KEY, b"other"):
        assert asked(kvikio, "put", key, seed=2, nbytes=9 * MIB)["status"] == "REJECTED"
    assert asked(kvikio, "get", nbytes=3 * MIB)["digest"] == digest(value(1, 3 * MIB))
    assert values_below(small) == [file_of(small / "kv", KEY)]


@pytest.mark.parametrize(("op", "kind"), [("get", "read"), ("put", "write")])
def test_a_future_that_stands_still_is_abandoned(
    tmp_path: Path, child: Start, op: str, kind: str
) -> None:
    """A future can't be cancelled: the call leaves at its deadline, and the buffer is given back
    when kvikio is done with it, not before."""
    kvikio = child(f"gds://{tmp_path}/kv?io=kvikio")
    asked(kvikio, "put", seed=1, nbytes=9 * MIB)
    arm = {"action": int(Action.STALL), "at": 2, "mask": mask_of(kind), "stall_ms": 1000}
    more: dict[str, Any] = {"watch_s": 2.0} if op == "get" else {"seed": 2}
    found = asked(kvikio, op, nbytes=9 * MIB, seconds=0.3, arm=arm, **more)
    assert found["status"] == "ABANDONED"
    assert found["seconds"] < 0.55
    if op == "get":
        assert found["released"] and not found["late"]
    time.sleep(1.0)
    whole = {digest(value(seed, 9 * MIB)) for seed in ((1,) if op == "get" else (1, 2))}
    assert asked(kvikio, "get", nbytes=9 * MIB)["digest"] in whole


def test_a_put_between_the_two_opens_of_a_file_gives_no_mix(tmp_path: Path, child: Start) -> None:
    """CuFile opens its file twice.  By name it would take its size from one value and its bytes
    from the next."""
    kvikio, theirs = (
        child(f"gds://{tmp_path}/kv?io=kvikio&direct=1"),
        FileConnector(f"{tmp_path}/kv"),
    )
    size = {1: 2 * MIB, 2: 3 * MIB}
    for number in (1, 2, 3):
        put(theirs, KEY, value(1, size[1]))
        arm = {"action": int(Action.STALL), "at": number, "mask": mask_of("open"), "stall_ms": 500}
        pending = kvikio.later("get", key=KEY.hex(), nbytes=4 * MIB, arm=arm)
        time.sleep(0.25)
        put(theirs, KEY, value(2, size[2]))
        found = pending.result()
        assert found["fired"] == 1, f"a get makes fewer than {number} opens"
        allowed = {(n, digest(value(seed, n))) for seed, n in size.items()}
        assert (found["nbytes"], found["digest"]) in allowed
    theirs.close()


def test_durability_host_syncs_file_and_name(tmp_path: Path, child: Start) -> None:
    kvikio = child(f"gds://{tmp_path}/kv?io=kvikio&durability=host")
    asked(kvikio, "put", seed=1, nbytes=100)
    seen = asked(kvikio, "put", seed=1, nbytes=MIB, arm={"action": int(Action.COUNT)})["seen"]
    assert seen["sync"] == 2 and seen["name"] == 1


def test_auto_does_not_take_a_driver_without_a_device(tmp_path: Path, child: Start) -> None:
    auto = child(f"gds://{tmp_path}/kv?task_size_bytes=65536")
    seen = asked(auto, "put", seed=1, nbytes=MIB, arm={"action": int(Action.COUNT)})["seen"]
    assert seen["write"] == 1


_WITHOUT_DRIVER = """
import sys
import kvikio
from gds_support import MIB, get, put
from lmcache_backend_gds import driver
from lmcache_backend_gds.connector import GdsConnector, capabilities
from lmcache_backend_gds.movers import KvikioMover
from lmcache_core.sdk import ValueFiles
if driver.look().libcuda:
    sys.exit("this machine has a libcuda")
files = ValueFiles(sys.argv[1], backend="gds")
claims = capabilities(
    durability="process", direct=False, io="kvikio", device=False, gds=False
)
mover = KvikioMover(files, kvikio.CuFile, task_size_bytes=MIB)
store = GdsConnector(files, mover, io="kvikio", capabilities=claims)
print(get(store, b"key", 100)[0].status.name, put(store, b"key", b"new").name)
store.close()
"""


def test_kvikio_without_a_driver_is_no_wrong_answer(tmp_path: Path) -> None:
    """Were the driver to vanish under an open connector: FAILED, and the value stays.  Its text
    ends like that of a missing file."""
    theirs = FileConnector(f"{tmp_path}/kv")
    put(theirs, KEY, value(1, 100))
    found = subprocess.run(
        [sys.executable, "-c", _WITHOUT_DRIVER, f"{tmp_path}/kv"],
        env={"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    if "has a libcuda" in found.stderr:
        pytest.skip(found.stderr.strip())
    assert found.stdout.split() == ["FAILED", "FAILED"], found.stderr
    assert get(theirs, KEY, 100)[1] == value(1, 100)
    assert values_below(tmp_path) == [file_of(tmp_path / "kv", KEY)]
    theirs.close()
