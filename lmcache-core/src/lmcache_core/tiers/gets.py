"""Reads of one tier: which keys it has, chunks brought to host, and what is known to be missing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from lmcache_core.sdk import GetResult, OpContext, Status
from lmcache_core.tiers.host import HostChunk
from lmcache_core.tiers.work import Parts, TierWork
from lmcache_core.transfer.executor import Lane

Asked = Callable[[list[bool], str], None]
"""Told one answer a key, in order, and why the store could not be asked ("" when it could)."""
Fetched = Callable[[Status | None, str], None]


class Gets(TierWork):
    """Of one tier.  Owner thread only, except inside its own jobs."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._unreadable: set[bytes] = set()
        self._absent: OrderedDict[bytes, float] = OrderedDict()

    def is_readable(self, key: bytes) -> bool:
        """False of a chunk that was there and not for us, such as one of a codec we lack."""
        return key not in self._unreadable

    def stored(self, key: bytes) -> None:
        """``key`` is there now."""
        self._absent.pop(key, None)
        self._unreadable.discard(key)

    def exists(self, keys: Sequence[bytes], done: Asked) -> None:
        """Ask for ``keys`` in batches; what the store lacked a moment ago is not asked again."""
        if not self._tier.available:
            self._tier.count("skipped_breaker", len(keys))
            done([False] * len(keys), "breaker")
            return
        answers = [False] * len(keys)
        asked = self._not_known_absent(keys)
        stamps = [self._quota.stamp(keys[i]) for i in asked]
        self._tier.count("skipped_absent", len(keys) - len(asked))
        starts = range(0, len(asked), self._tier.max_batch)
        waiting = len(starts)
        why = ""
        if not waiting:
            done(answers, why)
            return

        def settle(start: int, statuses: Sequence[Status]) -> None:
            nonlocal waiting, why
            for position, status in enumerate(statuses, start):
                key = keys[asked[position]]
                answers[asked[position]] = status is Status.OK
                if status is Status.MISS:
                    self._quota.vanished(key, stamps[position])
                    self._note_absent(key)
                elif status is not Status.OK:
                    why = "deadline" if status is Status.TIMED_OUT else "failed"
            waiting -= 1
            if not waiting:
                done(answers, why)

        for start in starts:
            batch = [keys[i] for i in asked[start : start + self._tier.max_batch]]
            self._calls.start(
                "exists",
                Lane.LOAD,
                len(batch),
                partial(self._tier.connector.exists, batch),
                partial(settle, start),
            )

    def fetch(self, chunk: HostChunk, done: Fetched, wanted: Callable[[], bool]) -> None:
        """See `RemoteTier.fetch`."""
        slot = self._host.slot(chunk)
        buffer = self._host.buffer(chunk, slot)
        chunk.stamp = self._quota.stamp(chunk.key)
        nbytes = 0
        why = ""

        def run(ctx: OpContext) -> list[Status]:
            nonlocal nbytes
            self._encoding.loads.begin(self._runtime.now_s())
            try:
                result: GetResult = self._tier.connector.get_into([chunk.key], [buffer], ctx)[0]
                nbytes = result.nbytes if result.status is Status.OK else 0
            finally:
                self._encoding.loads.end(self._runtime.now_s(), nbytes)
            return [result.status]

        def finish(statuses: list[Status], left_s: float) -> list[Status]:
            nonlocal why
            if statuses[0] is not Status.OK:
                return statuses
            opened = self._encoding.open(
                slot, key=chunk.key, layout=chunk.layout, nbytes=nbytes, timeout_s=left_s
            )
            chunk.framed, chunk.codec = not opened.codec, opened.codec
            why = opened.why
            return [opened.status]

        def answered(statuses: list[Status]) -> None:
            self._fetched(chunk, statuses[0], nbytes, why)
            done(statuses[0], why)

        def cancelled() -> None:
            self._tier.count("cancelled")
            done(None, "")

        self._calls.start(
            "get",
            Lane.LOAD,
            1,
            run,
            answered,
            wanted=wanted,
            cancelled=cancelled,
            finish=finish,
        )

    def _fetched(self, chunk: HostChunk, status: Status, nbytes: int, why: str) -> None:
        if status is Status.OK:
            chunk.origin, chunk.read_bytes = self._tier.name, nbytes
            self._tier.count("read_bytes", nbytes)
            self._quota.touch(chunk.key)
        elif status is Status.MISS and why:
            # It is there, but not for us: to be stored anew by whoever computes it.
            self._note_absent(chunk.key)
            if len(self._unreadable) >= self._tier.config.max_negative_keys:
                self._unreadable.clear()
            self._unreadable.add(chunk.key)
        elif status is Status.MISS:
            self._quota.forget([chunk.key])
        elif status in (Status.CORRUPT, Status.SIZE_MISMATCH):
            reason = why or status.value
            self._tier.count("corrupt")
            self._tier.count(f"corrupt.{reason}")
            self._log.warn("chunk_corrupt", tier=self._tier.name, why=reason, key=chunk.key.hex())
            self._tier.delete([chunk.key])

    def _not_known_absent(self, keys: Sequence[bytes]) -> list[int]:
        """Indices of the ``keys`` that the store did not lack a moment ago."""
        now_s = self._runtime.now_s()
        return [i for i, key in enumerate(keys) if self._absent.get(key, 0.0) <= now_s]

    def _note_absent(self, key: bytes) -> None:
        self._absent[key] = self._runtime.now_s() + self._tier.config.negative_ttl_s
        self._absent.move_to_end(key)
        if len(self._absent) > self._tier.config.max_negative_keys:
            self._absent.popitem(last=False)
