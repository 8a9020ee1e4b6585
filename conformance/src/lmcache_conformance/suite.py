"""The checks.  Each docstring starts with the check's id and states the rule it guards."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_conformance.harness import Harness, Memory, value, within
from lmcache_core.sdk import (
    OPTIONAL_PROTOCOLS,
    BackendClosed,
    ContractViolation,
    Durability,
    GetResult,
    OnExisting,
    RemoteConnector,
    Status,
    SupportsScan,
)

SIZE = 8192
AWKWARD = [
    b"\0", b"/", b"..", b".", b"a", b"A", bytes(range(64)), b"\xff" * 64, b"x" * 64,
    b"p" * 16 + b"1", b"p" * 16 + b"2", b"p" * 32 + b"1", b"p" * 32 + b"2", b"\n\r\0 ", b"%2e",
]  # fmt: skip


def put(store: RemoteConnector, items: dict[bytes, bytes]) -> list[Status]:
    """Put every item in one call."""
    memory = Memory([len(v) for v in items.values()])
    for i, content in enumerate(items.values()):
        memory.fill(i, content)
    return store.put_from(list(items), memory.buffers(read_only=True), within(10))


def get(store: RemoteConnector, key: bytes, nbytes: int = SIZE) -> tuple[GetResult, bytes]:
    """Get one key into a target of ``nbytes``; checks that nothing else was touched."""
    memory = Memory([nbytes])
    result = store.get_into([key], memory.buffers(), within(10))[0]
    assert memory.canaries_intact(), "bytes outside of the target were touched"
    return result, memory.bytes_of(0)


class ConnectorConformance:
    """Subclass it with ``harness``; every inherited test is one check.

    Attributes:
        harness: class of the backend's harness.
    """

    harness: type[Harness]

    @pytest.fixture
    def rig(self, tmp_path: Path) -> Iterator[Harness]:
        made = self.harness(tmp_path)
        yield made
        made.stop()

    @pytest.fixture
    def store(self, rig: Harness) -> Iterator[RemoteConnector]:
        opened = rig.open()
        yield opened
        opened.close()

    def test_a_claims_have_protocols(self, store: RemoteConnector) -> None:
        """A1: a capability that is claimed is implemented; capabilities are constant."""
        first = store.capabilities
        for flag, protocol in OPTIONAL_PROTOCOLS.items():
            assert not getattr(first, flag) or isinstance(store, protocol), flag
        put(store, {b"k": value(1, SIZE)})
        assert store.capabilities == first

    def test_b_round_trip(self, store: RemoteConnector) -> None:
        """B1: what was put comes back, whole, with its size; the source is unchanged."""
        content = value(1, SIZE)
        assert store.exists([b"k"], within(10)) == [Status.MISS]
        assert put(store, {b"k": content}) == [Status.OK]
        assert store.exists([b"k"], within(10)) == [Status.OK]
        assert get(store, b"k") == (GetResult(Status.OK, SIZE), content)

    def test_b_absent(self, store: RemoteConnector) -> None:
        """B2: an absent key is MISS; its delete is OK."""
        assert get(store, b"none")[0].status is Status.MISS
        assert store.delete([b"none"], within(10)) == [Status.OK]

    def test_b_put_of_a_present_key(self, store: RemoteConnector) -> None:
        """B3: a put of a present key answers OK and leaves what ``on_existing`` says."""
        old, new = value(1, SIZE), value(2, SIZE)
        put(store, {b"k": old})
        assert put(store, {b"k": new}) == [Status.OK]
        keeps = store.capabilities.on_existing is OnExisting.KEEP
        assert get(store, b"k")[1] == (old if keeps else new)

    def test_b_delete(self, store: RemoteConnector) -> None:
        """B4: a deleted key is absent; deleting it again is OK."""
        put(store, {b"k": value(1, SIZE)})
        assert store.delete([b"k"], within(10)) == [Status.OK]
        assert store.delete([b"k"], within(10)) == [Status.OK]
        assert get(store, b"k")[0].status is Status.MISS

    def test_b_larger_target(self, store: RemoteConnector) -> None:
        """B5: a larger target is fine; nbytes says the value's size."""
        content = value(1, SIZE)
        put(store, {b"k": content})
        result, found = get(store, b"k", 3 * SIZE)
        assert result == GetResult(Status.OK, SIZE)
        assert found[:SIZE] == content

    def test_b_smaller_target(self, store: RemoteConnector) -> None:
        """B6: a smaller target is SIZE_MISMATCH, and nothing beside it is touched."""
        put(store, {b"k": value(1, 2 * SIZE)})
        result, _ = get(store, b"k", SIZE)
        assert result.status is Status.SIZE_MISMATCH
        assert result.nbytes in (0, 2 * SIZE)

    def test_c_order_and_mixed_answers(self, store: RemoteConnector) -> None:
        """C1: answers keep the order of the keys; a miss does not poison the rest."""
        put(store, {b"a": value(1, SIZE), b"c": value(3, SIZE)})
        keys = [b"c", b"b", b"a"]
        want = [Status.OK, Status.MISS, Status.OK]
        assert store.exists(keys, within(10)) == want
        memory = Memory([SIZE] * 3)
        results = store.get_into(keys, memory.buffers(), within(10))
        assert [r.status for r in results] == want
        assert (memory.bytes_of(0), memory.bytes_of(2)) == (value(3, SIZE), value(1, SIZE))

    def test_c_empty_batch(self, store: RemoteConnector) -> None:
        """C2: an empty batch gives an empty list."""
        assert store.exists([], within(10)) == []
        assert store.get_into([], [], within(10)) == []
        assert store.put_from([], [], within(10)) == []
        assert store.delete([], within(10)) == []

    def test_c_over_max_batch(self, store: RemoteConnector) -> None:
        """C3: over max_batch is a ContractViolation and nothing is touched."""
        keys = [b"%d" % i for i in range(store.capabilities.max_batch + 1)]
        put(store, {keys[0]: value(1, SIZE)})
        with pytest.raises(ContractViolation):
            store.delete(keys, within(10))
        assert store.exists(keys[:1], within(10)) == [Status.OK]

    def test_c_overlap(self, store: RemoteConnector) -> None:
        """C4: overlapping targets are a ContractViolation and nothing is touched."""
        put(store, {b"a": value(1, SIZE), b"b": value(2, SIZE)})
        memory = Memory([SIZE])
        before = memory.bytes_of(0)
        target = memory.buffers()[0]
        with pytest.raises(ContractViolation):
            store.get_into([b"a", b"b"], [target, target], within(10))
        assert memory.bytes_of(0) == before

    def test_d_deadline_in_the_past(self, store: RemoteConnector) -> None:
        """D1: a deadline never raises: unfinished keys are TIMED_OUT, and absent or whole."""
        started = time.monotonic()
        assert store.exists([b"k"], within(-1)) == [Status.TIMED_OUT]
        assert store.delete([b"k"], within(-1)) == [Status.TIMED_OUT]
        assert time.monotonic() - started < 1.0

    def test_d_sizes(self, store: RemoteConnector) -> None:
        """D2: values of every size that alignment allows come back."""
        step = store.capabilities.alignment
        for size in {step, 3 * step, 4096, 65536, 1 << 20}:
            content = value(size, size)
            assert put(store, {b"size": content}) == [Status.OK]
            store_result, found = get(store, b"size", size)
            assert store_result == GetResult(Status.OK, size)
            assert found == content
            store.delete([b"size"], within(10))

    def test_e_awkward_keys(self, store: RemoteConnector) -> None:
        """E1: keys are opaque bytes: NUL, '/', '..', case twins, lengths 1 and 64."""
        items = {key: value(i, SIZE) for i, key in enumerate(AWKWARD)}
        assert put(store, items) == [Status.OK] * len(items)
        for key, content in items.items():
            assert get(store, key)[1] == content, key

    def test_f_same_key_race(self, store: RemoteConnector) -> None:
        """F1: while puts race, every get gives one whole value, and never MISS."""
        values = [value(i, SIZE) for i in range(2)]
        put(store, {b"k": values[0]})
        wrong: list[object] = []
        stop = time.monotonic() + 0.5

        def write(content: bytes) -> None:
            while time.monotonic() < stop:
                put(store, {b"k": content})

        def read() -> None:
            while time.monotonic() < stop:
                result, found = get(store, b"k")
                if result.status is not Status.OK or found not in values:
                    wrong.append(result)

        count = min(4, store.capabilities.max_concurrency)
        jobs = [lambda v=v: write(v) for v in values[: max(1, count // 2)]] + [read, read]
        threads = [threading.Thread(target=job) for job in jobs[:count]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_f_closed(self, rig: Harness) -> None:
        """F2: close is idempotent; after it every call is BackendClosed."""
        store = rig.open()
        store.close()
        store.close()
        with pytest.raises(BackendClosed):
            store.exists([b"k"], within(10))

    def test_f_forked(self, store: RemoteConnector) -> None:
        """F3: a connector belongs to its process: in a forked child it is BackendClosed."""
        pid = os.fork()
        if pid == 0:
            try:
                store.exists([b"k"], within(10))
            except BackendClosed:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    def test_g_no_view_is_kept(self, store: RemoteConnector) -> None:
        """G1: when a call returns its buffers are core's again: no view is retained."""
        from lmcache_core.sdk import Buffer

        content = value(1, SIZE)
        put(store, {b"k": content})
        owned = bytearray(SIZE)
        view = memoryview(owned)
        store.get_into([b"k"], [Buffer(view, 4096, SIZE)], within(10))
        view.release()
        owned.extend(b"!")  # raises BufferError while a view of it lives
        assert bytes(owned[:SIZE]) == content

    def test_i_durable_over_reopen(self, rig: Harness) -> None:
        """I1: where more than NONE is claimed, a new connector finds what was put."""
        store = rig.open()
        content = value(1, SIZE)
        put(store, {b"k": content})
        claimed = store.capabilities.durability is not Durability.NONE
        store.close()
        again = rig.open()
        result, found = get(again, b"k")
        again.close()
        if claimed:
            assert (result.status, found) == (Status.OK, content)
        else:
            assert result.status in (Status.OK, Status.MISS)

    def test_i_scan(self, store: RemoteConnector) -> None:
        """I2: where scan is claimed it gives every key of a prefix, with its size."""
        put(store, {b"aa1": value(1, SIZE), b"aa2": value(2, 4096), b"b": value(3, SIZE)})
        if not store.capabilities.scan:
            assert not isinstance(store, SupportsScan) or store.capabilities.scan is False
            return
        assert isinstance(store, SupportsScan)
        found = {entry.key: entry.nbytes for entry in store.scan(b"aa", within(10))}
        assert found == {b"aa1": SIZE, b"aa2": 4096}

    def test_j_health(self, store: RemoteConnector) -> None:
        """J1: a store that works says so."""
        assert store.health(within(10)).ok

    @settings(
        max_examples=30,
        deadline=None,
        # One store serves all examples, on purpose; each subclass is a backend of its own.
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.differing_executors,
        ],
    )
    @given(data=st.data())
    def test_k_like_a_dictionary(self, store: RemoteConnector, data: st.DataObject) -> None:
        """K1: any sequence of puts, gets and deletes answers like a dictionary."""
        keys = [b"k0", b"k1", b"k2"]
        model: dict[bytes, bytes] = {}
        store.delete(keys, within(10))
        keeps = store.capabilities.on_existing is OnExisting.KEEP
        for _ in range(data.draw(st.integers(1, 12))):
            key = data.draw(st.sampled_from(keys))
            op = data.draw(st.sampled_from(["put", "get", "delete", "exists"]))
            if op == "put":
                content = value(data.draw(st.integers(0, 9)), SIZE)
                assert put(store, {key: content}) == [Status.OK]
                if not (keeps and key in model):
                    model[key] = content
            elif op == "delete":
                assert store.delete([key], within(10)) == [Status.OK]
                model.pop(key, None)
            elif op == "exists":
                want = Status.OK if key in model else Status.MISS
                assert store.exists([key], within(10)) == [want]
            else:
                result, found = get(store, key)
                assert (found if result.status is Status.OK else None) == model.get(key)
