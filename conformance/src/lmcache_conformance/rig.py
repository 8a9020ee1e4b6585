"""What a check works with: connectors on one store, memory, and words for what went wrong."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from lmcache_conformance.frame import Inconclusive, Wrong
from lmcache_conformance.harness import Harness, TcpHarness
from lmcache_conformance.memory import Memory
from lmcache_conformance.proxy import FaultProxy, Faults
from lmcache_core import plugins
from lmcache_core.sdk import (
    BACKEND_GROUP,
    CLOSE_LIMIT_S,
    BackendClosed,
    BackendUnavailable,
    Capabilities,
    GetResult,
    HostServices,
    OpContext,
    Region,
    ReleaseToken,
    RemoteConnector,
    Status,
)

SIZE = 8192
PATIENCE_S = 10.0
DONE = (Status.OK,)
UNFINISHED = (Status.TIMED_OUT, Status.ABANDONED, Status.FAILED)


def within(seconds: float) -> OpContext:
    """A context whose deadline is ``seconds`` from now."""
    return OpContext(deadline_s=time.monotonic() + seconds)


class Count:
    """A counter of `HostServices`."""

    def __init__(self) -> None:
        self.value = 0

    def inc(self, amount: int = 1) -> None:
        """Add ``amount``."""
        self.value += amount


class Host:
    """Core's side of `HostServices`, observed.

    Attributes:
        services: to hand to a connector.
        released: tokens that the connector gave back, in order.
    """

    def __init__(self, scratch: Path, regions: Sequence[Region] = ()) -> None:
        self.released: list[ReleaseToken] = []
        self.regions = list(regions)
        self._added: list[object] = []
        self.services = HostServices(
            logger=logging.getLogger("lmcache_conformance.backend"),
            counter=lambda name: Count(),
            clock=time.monotonic,
            tmp_dir=scratch,
            regions=lambda: tuple(self.regions),
            on_region_added=self._added.append,
            on_region_removed=self._added.append,
            released=self.released.append,
        )


def entry_points_of(url: str, module: str) -> plugins.EntryPoints:
    """The installed ones, and ``module`` for the URL's scheme when it is given."""
    installed = metadata.entry_points(group=BACKEND_GROUP)
    if not module:
        return lambda: installed
    scheme = url.partition(":")[0]
    own = metadata.EntryPoint(name=scheme, value=module, group=BACKEND_GROUP)
    return lambda: [own, *(each for each in installed if each.name != scheme)]


class Rig:
    """One check's hold on the store.  Its connectors are closed when the check ends.

    Attributes:
        harness, url, scratch: see `Harness`.
        full: the long form of a check is asked for.
        seed: of everything random in the check.
        figures: measured here, shown in the certificate.
    """

    def __init__(
        self, harness: Harness, *, scratch: Path, full: bool = False, seed: int = 0
    ) -> None:
        self.harness = harness
        self.url = harness.url()
        self.scratch = scratch
        self.full = full
        self.seed = seed
        self.figures: dict[str, float] = {}
        self.host = Host(scratch)
        self._open: list[RemoteConnector] = []
        self._children: list[object] = []
        self._prefix = secrets.token_bytes(8)
        self._numbers = itertools.count()
        self._store: RemoteConnector | None = None

    @property
    def store(self) -> RemoteConnector:
        """The check's connector, opened at first use."""
        if self._store is None:
            self._store = self.open()
        return self._store

    @property
    def claims(self) -> Capabilities:
        """What the connector claims."""
        return self.store.capabilities

    @property
    def proxy(self) -> FaultProxy:
        """The proxy before the store.

        Raises:
            Inconclusive: the harness is no `TcpHarness`, or its URL goes around the proxy.
        """
        if not isinstance(self.harness, TcpHarness):
            raise Inconclusive("the harness is no TcpHarness, so there is no fault proxy")
        proxy = self.harness.proxy
        if str(proxy.port) not in self.url:
            raise Inconclusive("the harness's URL does not go through the fault proxy")
        return proxy

    def open(self, url: str = "") -> RemoteConnector:
        """Another connector, on the same store unless told otherwise."""
        url = url or self.url
        points = entry_points_of(url, self.harness.module)
        opened = plugins.open_connector(url, self.host.services, points)
        self._open.append(opened)
        return opened

    def key(self, name: object = "") -> bytes:
        """A key that no other check uses; the same for the same ``name``."""
        return self._prefix + str(name or next(self._numbers)).encode()

    def keys(self, count: int) -> list[bytes]:
        """So many keys."""
        return [self.key(f"k{i}") for i in range(count)]

    def size(self, nbytes: int = SIZE) -> int:
        """``nbytes`` rounded up to what alignment allows."""
        step = self.claims.alignment
        return -(-nbytes // step) * step

    def put(
        self,
        items: Mapping[bytes, bytes],
        store: RemoteConnector | None = None,
        seconds: float = PATIENCE_S,
    ) -> list[Status]:
        """Put every item in one call; the sources must stay as they were."""
        store = store or self.store
        memory = Memory.of(list(items.values()))
        answers = store.put_from(list(items), memory.buffers(read_only=True), within(seconds))
        self.expect_answers(answers, len(items), Status, "put_from")
        for index, content in enumerate(items.values()):
            self.expect(memory.bytes_of(index) == content, "put_from changed its source")
        self.expect(memory.canaries_intact(), "put_from wrote beside its source")
        return answers

    def must_put(self, items: Mapping[bytes, bytes], store: RemoteConnector | None = None) -> None:
        """Put, and every answer is OK."""
        answers = self.put(items, store)
        self.expect(set(answers) <= set(DONE), f"put_from of new keys answered {names(answers)}")

    def get(
        self,
        key: bytes,
        nbytes: int,
        store: RemoteConnector | None = None,
        seconds: float = PATIENCE_S,
    ) -> tuple[GetResult, bytes]:
        """Get one key; the result and, when it is OK, the value."""
        memory = Memory([nbytes])
        results = (store or self.store).get_into([key], memory.buffers(), within(seconds))
        self.expect_answers(results, 1, GetResult, "get_into")
        self.expect(memory.canaries_intact(), "get_into wrote outside of its target")
        result = results[0]
        if result.status is not Status.OK:
            return result, b""
        self.expect(
            0 <= result.nbytes <= nbytes,
            f"get_into answered OK with nbytes={result.nbytes} for a target of {nbytes}",
        )
        return result, memory.bytes_of(0, result.nbytes)

    def expect_value(
        self, key: bytes, content: bytes, what: str, store: RemoteConnector | None = None
    ) -> None:
        """``key`` gives exactly ``content``."""
        result, found = self.get(key, self.size(len(content)), store)
        self.expect(
            result == GetResult(Status.OK, len(content)),
            f"{what}: get_into answered {result.status.name} with nbytes={result.nbytes}, "
            f"due is OK with {len(content)}",
        )
        self.expect(found == content, f"{what}: get_into answered OK with {differ(found, content)}")

    def expect_absent(self, key: bytes, what: str, store: RemoteConnector | None = None) -> None:
        """``key`` is a MISS."""
        status = self.get(key, self.size(), store)[0].status
        self.expect(status is Status.MISS, f"{what}: get_into answered {status.name}, due is MISS")

    def expect_one_of(
        self, key: bytes, allowed: Iterable[bytes | None], nbytes: int, what: str,
        store: RemoteConnector | None = None,
    ) -> None:  # fmt: skip
        """``key`` is one of these whole values; None allows a miss, or CORRUPT."""
        result, found = self.get(key, nbytes, store)
        self.expect_allowed(result.status, found, allowed, what)

    def expect_allowed(
        self, status: Status, found: bytes, allowed: Iterable[bytes | None], what: str
    ) -> None:
        """What a get gave is one of these; see `expect_one_of`."""
        allowed = list(allowed)
        if status is Status.OK:
            self.expect(found in allowed, f"{what}: OK with bytes that no put wrote whole")
            return
        fine = status in (Status.MISS, Status.CORRUPT) and None in allowed
        self.expect(fine, f"{what}: get_into answered {status.name}, the value must be there")

    def expect(self, holds: object, message: str) -> None:
        """Raise `Wrong` unless ``holds``."""
        if not holds:
            raise Wrong(message)

    def expect_answers(self, answers: object, count: int, kind: type, op: str) -> None:
        """``answers`` is a list of ``count`` members of ``kind``."""
        self.expect(
            isinstance(answers, list),
            f"{op} returned a {type(answers).__name__}; return a list with one answer a key",
        )
        assert isinstance(answers, list)
        self.expect(len(answers) == count, f"{op} gave {len(answers)} answers to {count} keys")
        wrong = next((each for each in answers if not isinstance(each, kind)), None)
        self.expect(
            wrong is None,
            f"{op} answered {wrong!r}; each answer is a {kind.__name__}",
        )

    def until_well(self, store: RemoteConnector, limit_s: float = 10.0) -> None:
        """Wait until a connector works again after a fault; it must, without being reopened."""
        end_s = time.monotonic() + limit_s
        key, last = self.key(f"well{next(self._numbers)}"), "nothing"
        content = b"w" * self.size()
        while time.monotonic() < end_s:
            try:
                answers = self.put({key: content}, store, seconds=2.0)
            except (BackendUnavailable, BackendClosed) as error:
                last = repr(error)
            else:
                if answers == [Status.OK]:
                    self.expect_value(key, content, "after the fault", store)
                    return
                last = answers[0].name
            time.sleep(0.05)
        raise Wrong(f"the store is well again for {limit_s:.0f} s, put_from still gives {last}")

    def get_when_well(self, key: bytes, nbytes: int, limit_s: float = 10.0) -> tuple[Status, bytes]:
        """What a get answers once it is neither unavailable nor unfinished; the last one else."""
        end_s = time.monotonic() + limit_s
        while True:
            late = time.monotonic() >= end_s
            try:
                result, found = self.get(key, nbytes, seconds=2.0)
            except BackendUnavailable:
                if late:
                    raise
            else:
                if late or result.status not in UNFINISHED:
                    return result.status, found
            time.sleep(0.05)

    def adopt(self, child: object) -> None:
        """Close ``child`` when the check ends."""
        self._children.append(child)

    def finish(self) -> list[str]:
        """Lift every fault, close every connector; what went wrong with that."""
        wrong: list[str] = []
        if isinstance(self.harness, TcpHarness):
            self.harness.proxy.faults = Faults()
        for child in self._children:
            child.close()  # type: ignore[attr-defined]
        for store in self._open:
            started_s = time.monotonic()
            try:
                store.close()
            except Exception as error:  # reported as the check's answer
                wrong.append(f"close() raised {error!r}")
            seconds = time.monotonic() - started_s
            if seconds > CLOSE_LIMIT_S + 0.25:
                wrong.append(f"close() took {seconds:.1f} s, allowed are {CLOSE_LIMIT_S:.0f} s")
        return wrong


def names(answers: Iterable[Status]) -> str:
    """For a message: the distinct answers."""
    return ", ".join(sorted({each.name for each in answers}))


def differ(found: bytes, content: bytes) -> str:
    """For a message: how ``found`` is not ``content``."""
    if len(found) != len(content):
        return f"{len(found)} bytes, {len(content)} were put"
    at = next((i for i, (a, b) in enumerate(zip(found, content)) if a != b), -1)
    return f"other bytes from offset {at} on" if at >= 0 else "the same bytes"


def in_threads(jobs: Sequence[object], limit_s: float = 60.0) -> None:
    """Run callables at once; raise the first exception of any.

    Raises:
        Wrong: one did not return within ``limit_s``.
    """
    errors: list[BaseException] = []

    def run(job: object) -> None:
        try:
            job()  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    end_s = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, end_s - time.monotonic()))
    if errors:
        raise errors[0]
    if any(thread.is_alive() for thread in threads):
        raise Wrong(f"calls at the same time did not return within {limit_s:.0f} s")
