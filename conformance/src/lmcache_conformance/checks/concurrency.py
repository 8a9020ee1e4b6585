"""F: many threads on one connector, and its end."""

from __future__ import annotations

import threading
import time

from lmcache_conformance.checks.api import expect_closed
from lmcache_conformance.child import Child
from lmcache_conformance.frame import NotClaimed, Wrong, check
from lmcache_conformance.memory import value
from lmcache_conformance.rig import UNFINISHED, Rig, in_threads, names, within
from lmcache_core.sdk import (
    CLOSE_LIMIT_S,
    BackendClosed,
    BackendUnavailable,
    GetResult,
    OnExisting,
    RemoteConnector,
    Sharing,
    Status,
)


@check("F1", fix="share nothing between calls but what a lock guards; claim less max_concurrency")
def max_concurrency_threads(rig: Rig) -> None:
    """max_concurrency threads at once, each with keys of its own, all get right answers."""
    count = min(rig.claims.max_concurrency, 32)
    size = rig.size(64 << 10)
    end_s = time.monotonic() + (5.0 if rig.full else 1.0)

    def work(number: int) -> None:
        turn = 0
        while time.monotonic() < end_s:
            turn += 1
            key, content = rig.key(f"t{number}"), value(number * 1000 + turn % 3, size)
            rig.store.delete([key], within(10))
            rig.must_put({key: content})
            rig.expect_value(key, content, f"with {count} threads")

    in_threads([lambda n=n: work(n) for n in range(count)])


@check("F2", fix="publish a value with one atomic step (rename, one transaction, one pointer)")
def racing_puts_and_gets(rig: Rig) -> None:
    """While puts of one key race, every get gives one whole value, and never MISS unless the store
    evicts; while puts and deletes do, the whole value or none."""
    if rig.claims.max_concurrency < 2:
        writers = readers = [rig.store, rig.open()]
    else:
        writers = readers = [rig.store, rig.store]
    size, key = rig.size(256 << 10), rig.key("k")
    contents = [value(i, size) for i in range(2)]
    allowed = [*contents, None] if rig.claims.evicts else list(contents)
    rig.must_put({key: contents[0]})
    end_s = time.monotonic() + (6.0 if rig.full else 1.0)
    readers = readers[: max(1, rig.claims.max_concurrency - 1)]

    def write() -> None:
        turn = 0
        while time.monotonic() < end_s:
            turn += 1
            rig.must_put({key: contents[turn % 2]}, writers[0])

    def read(number: int) -> None:
        while time.monotonic() < end_s:
            rig.expect_one_of(key, allowed, size, "while puts race", readers[number])

    in_threads([write, *(lambda n=n: read(n) for n in range(len(readers)))])
    _puts_against_deletes(rig, writers[-1], value(3, rig.size(64)))


def _puts_against_deletes(rig: Rig, other: RemoteConnector, content: bytes) -> None:
    key, end_s = rig.key("changing"), time.monotonic() + (3.0 if rig.full else 0.4)

    def change(store: RemoteConnector, op: str) -> None:
        while time.monotonic() < end_s:
            if op == "put":
                answers = rig.put({key: content}, store, seconds=2.0)
            else:
                answers = store.delete([key], within(2))
            # Each may give up, after it was beaten too often.
            fine = set(answers) <= {Status.OK, *UNFINISHED}
            rig.expect(fine, f"{op} beside others answered {names(answers)}")
            result, found = rig.get(key, len(content), store, seconds=2.0)
            if result.status not in UNFINISHED:
                what = "while puts and deletes race"
                rig.expect_allowed(result.status, found, [content, None], what)

    in_threads([lambda: change(rig.store, "put"), lambda: change(other, "delete")])


@check("F3", fix="close() marks, then lets calls in flight end by their deadline")
def close_during_calls(rig: Rig) -> None:
    """close during calls returns within its limit; those calls end by their deadline with a right
    answer or BackendClosed; every later one is BackendClosed."""
    for _ in range(4):
        store, size = rig.open(), rig.size(256 << 10)
        key, content = rig.key(), value(rig.seed, size)
        rig.must_put({key: content}, store)
        busy = _Busy(rig, store, key, content)
        time.sleep(0.03)
        started_s = time.monotonic()
        store.close()
        seconds = time.monotonic() - started_s
        time.sleep(0.02)
        busy.stop()
        rig.expect(seconds < CLOSE_LIMIT_S + 0.25, f"close() took {seconds:.1f} s")
        expect_closed(rig, store, "after close()")


class _Busy:
    """Threads that get and put one key of one connector until it is closed."""

    def __init__(self, rig: Rig, store: RemoteConnector, key: bytes, content: bytes) -> None:
        self._rig, self._store, self._key, self._content = rig, store, key, content
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        count = min(2, store.capabilities.max_concurrency)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Wait for every call to end; what one did wrong is raised."""
        self._stop.set()
        for thread in self._threads:
            thread.join(4.0)
        if any(thread.is_alive() for thread in self._threads):
            raise Wrong("a call hangs after close()")
        if self._errors:
            raise self._errors[0]

    def _run(self) -> None:
        rig, store = self._rig, self._store
        try:
            while not self._stop.is_set():
                result, found = rig.get(self._key, len(self._content), store, seconds=2.0)
                if result.status is Status.OK:
                    rig.expect(found == self._content, "a get during close gave wrong bytes")
                    rig.put({self._key: self._content}, store, seconds=2.0)
        except (BackendClosed, BackendUnavailable):
            return
        except BaseException as error:  # raised again by `stop`
            self._errors.append(error)


@check("F4", fix="release in close() what open made: descriptors, threads, pools")
def open_and_close_often(rig: Rig) -> None:
    """Opening and closing 200 times (40 in the quick plan) works every time and ends with as many
    files and threads as it began."""
    from lmcache_conformance.checks.leaks import settled

    key, content = rig.key("k"), value(rig.seed, rig.size())

    def once() -> None:
        store = rig.open()
        rig.must_put({key: content}, store)
        store.close()

    once()
    before, stored = settled(), rig.harness.stored()
    for _ in range(200 if rig.full else 40):
        once()
    after = settled(before)
    rig.expect(after.files <= before.files, f"{after.files - before.files} files stay open")
    left = rig.harness.stored() - stored
    rig.expect(left <= 2, f"opening and closing left {left} files in the store")
    rig.expect(after.threads <= before.threads, f"{after.threads - before.threads} threads stay")


@check("F5", fix="a second close() returns at once")
def close_twice(rig: Rig) -> None:
    """close is idempotent, and after it every method is BackendClosed."""
    store = rig.open()
    rig.must_put({rig.key("k"): value(rig.seed, rig.size())}, store)
    store.close()
    store.close()
    expect_closed(rig, store, "after close()")
    result = rig.get(rig.key("other"), rig.size())[0]
    rig.expect(result == GetResult(Status.MISS), "another connector was closed too")


@check("F6", fix="at open, leave what belongs to processes that live; at close, only what is yours")
def opening_beside_puts(rig: Rig) -> None:
    """Connectors that open and close do not disturb the puts of others, in this process and in
    another one."""
    if rig.claims.sharing is Sharing.PROCESS:
        raise NotClaimed("sharing is process")
    key, size = rig.key("k"), rig.size(256 << 10)

    def write() -> None:
        turn = 0
        while time.monotonic() < end_s:
            turn += 1
            rig.must_put({key: value(turn, size)})
        kept = 1 if rig.claims.on_existing is OnExisting.KEEP else turn
        rig.expect_value(key, value(kept, size), "after connectors were opened beside")

    def open_and_close() -> None:
        while time.monotonic() < end_s:
            rig.open().close()

    with Child(rig.url, rig.harness.module, rig.scratch) as child:
        # From now on: a child may take long to start.
        end_s = time.monotonic() + (4.0 if rig.full else 1.0)
        in_threads([write, open_and_close])
        found = child.call("get", key=key.hex(), nbytes=size)
    rig.expect(found.get("status") == "OK", f"another process gets {found}")
