"""H7 to H9: the n-th system call of an operation fails, for every n."""

from __future__ import annotations

import errno

from lmcache_conformance.checks.faults import expect_answer
from lmcache_conformance.checks.stalling import does_io
from lmcache_conformance.child import Child, Died, digest
from lmcache_conformance.frame import NotClaimed, Profile, Wrong, check
from lmcache_conformance.memory import value
from lmcache_conformance.rig import SIZE, Rig
from lmcache_conformance.shim import Action, mask_of
from lmcache_core.sdk import OnExisting

_MOST_CALLS = {False: 24, True: 400}


@check(
    "H7",
    profile=Profile.RESILIENT,
    limit_s=300,
    fix="raise or answer what the system call said; BatchLoop maps an OSError",
)
def io_error_at_every_call(rig: Rig) -> None:
    """When the n-th system call of an operation fails (EIO), for every n, the answer is no OK for
    what was not done, values stay whole, others untouched, and it works again."""
    _each_call(rig, errno.EIO, mask_of("read", "write", "sync", "open", "connect", "send", "recv",
        "name"))  # fmt: skip


@check(
    "H8",
    profile=Profile.RESILIENT,
    fix="ENOSPC is REJECTED; remove what was written; never touch the value that is there",
)
def disk_full_at_every_call(rig: Rig) -> None:
    """No space (ENOSPC) at the n-th writing call, for every n, harms nothing that is stored."""
    _each_call(rig, errno.ENOSPC, mask_of("write", "sync", "open", "name"))


@check(
    "H9",
    profile=Profile.RESILIENT,
    fix="EMFILE says nothing about the value: FAILED or BackendUnavailable, and delete nothing",
)
def no_file_descriptors(rig: Rig) -> None:
    """Out of file descriptors (EMFILE) nothing is called MISS that is there, nothing is deleted,
    and it works again when there are some."""
    key, content = rig.key("k"), value(rig.seed, rig.size())
    rig.must_put({key: content})
    with Child(rig.url, rig.harness.module, rig.scratch, preload=True) as child:
        does_io(rig, child)
        child.call("take_files")
        for op, arguments in (
            ("get", {"nbytes": len(content)}), ("exists", {}),
            ("put", {"seed": 7, "nbytes": len(content)}), ("get", {"nbytes": len(content)}),
        ):  # fmt: skip
            found = child.call(op, key=key.hex(), **arguments)
            expect_answer(rig, found, f"{op} without file descriptors")
            rig.expect(
                found.get("status") != "MISS", f"{op} without file descriptors called it MISS"
            )
        child.call("give_files")
        found = child.call("get", key=key.hex(), nbytes=len(content))
        allowed = {digest(content), digest(value(7, len(content)))}
        rig.expect(found.get("digest") in allowed, f"after EMFILE: {found}")


def _each_call(rig: Rig, error: int, mask: int) -> None:
    """Let the n-th call of every operation fail, for every n; see the checks above."""
    size = rig.size(SIZE)
    before = rig.harness.stored()
    used: list[bytes] = []
    neighbour, kept = rig.key("neighbour"), value(rig.seed, size)
    rig.must_put({neighbour: kept})
    with Child(rig.url, rig.harness.module, rig.scratch, preload=True) as child:
        does_io(rig, child)
        fired = 0
        for op in ("exists", "get", "put", "replace", "delete"):
            for number in range(1, _MOST_CALLS[rig.full] + 1):
                used.append(rig.key(f"{op}{number}"))
                if not _nth_call(rig, child, op, number, error, mask, size):
                    break
                fired += 1
            found = child.call("get", key=neighbour.hex(), nbytes=size)
            rig.expect(
                found.get("digest") == digest(kept), f"an error during {op} harmed another key"
            )
        for key in (*used, neighbour):
            child.call("delete", key=key.hex())
    left = rig.harness.stored() - before
    rig.expect(left <= 2, f"failed puts left {left} files in the store")
    if not fired:
        raise NotClaimed("no operation makes a call of this kind")


def _nth_call(
    rig: Rig, child: Child, op: str, number: int, error: int, mask: int, size: int
) -> bool:
    """Whether ``op`` made so many calls, and the ``number``-th failed."""
    key, old, new = rig.key(f"{op}{number}"), value(number, size), value(number + 1000, size)
    before = None if op == "put" else old
    what = f"{op} whose system call {number} fails with {errno.errorcode[error]}"
    if before is not None:
        found = child.call("put", key=key.hex(), seed=number, nbytes=size)
        rig.expect(found.get("status") == "OK", f"a put between faults answered {found}")
    arm = {"action": int(Action.ERRNO), "at": number, "error": error, "mask": mask}
    try:
        if op == "get":
            found = child.call("get", key=key.hex(), nbytes=size, seconds=2, arm=arm)
        elif op in ("put", "replace"):
            found = child.call(
                "put", key=key.hex(), seed=number + 1000, nbytes=size, seconds=2, arm=arm
            )
        else:
            found = child.call(op, key=key.hex(), seconds=2, arm=arm)
    except Died as death:
        raise Wrong(f"{what}: the process died with {death.code}") from None
    hit = bool(found.get("fired"))
    expect_answer(rig, found, what)
    said = found.get("status")
    allowed: set[str | None]
    if op in ("exists", "get"):
        allowed = {digest(old)}
        rig.expect(not hit or said != "MISS", f"{what}: answered MISS, the value is there")
        rig.expect(found.get("digest") in (digest(old), None), f"{what}: OK with other bytes")
    elif op == "delete":
        allowed = {None} if said == "OK" else {digest(old), None}
    else:
        earlier = digest(old) if before is not None else None
        keeps = rig.claims.on_existing is OnExisting.KEEP
        stays = earlier if keeps and earlier is not None else digest(new)
        allowed = {stays} if said == "OK" else {earlier, digest(new), None}
    after = child.call("get", key=key.hex(), nbytes=size)
    rig.expect(after.get("status") in ("OK", "MISS", "CORRUPT"), f"after {what}: {after}")
    rig.expect(after.get("digest") in allowed, f"after {what} (answered {said}): {after}")
    return hit
