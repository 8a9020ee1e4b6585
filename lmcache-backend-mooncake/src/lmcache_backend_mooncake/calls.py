"""`Calls`: what each operation is in calls of Mooncake's library, and how its traps are met.

Runs in the helper process.  Places are addresses there; codes are the library's (see `codes`).
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lmcache_backend_mooncake.codes import AWAY, Code

_RETRY_AFTER_S = 0.02
_LISTENS_LIMIT_S = 0.5
_OTHERS_PUT_LIMIT_S = 0.2
_NO_KEY = "lmc-health"
_NO_VALUE = AWAY | {Code.OBJECT_NOT_FOUND}


class Calls:
    """Operations on a batch of keys, each to end by ``end_s`` on the monotonic clock; thread-safe.

    Args:
        store: an opened ``MooncakeDistributedStore``.
        config: the ``ReplicateConfig`` of puts.
        master: host and port.
    """

    def __init__(self, store: Any, config: Any, *, master: tuple[str, int]) -> None:
        self._store, self._config, self._master = store, config, master
        self._master_failed = False
        self._putting: set[str] = set()
        self._lock = threading.Lock()

    def exists(self, keys: list[str], end_s: float) -> list[int]:
        """Of each 1, 0 or a code: a hint, for the lender may have died."""
        return self._again(len(keys), lambda: self._store.batch_is_exist(keys), end_s)

    def health(self, end_s: float) -> list[int]:
        """One code, below 0 when the master does not answer."""
        # health_check() says 0 of a master that is dead.
        return self.exists([_NO_KEY], end_s)

    def delete(self, keys: list[str], end_s: float) -> list[int]:
        """Codes."""
        # Each get, and each exists, takes a lease of seconds; force goes over it.
        return self._again(len(keys), lambda: self._store.batch_remove(keys, True), end_s)

    def get(
        self, keys: list[str], at: list[int], sizes: list[int], end_s: float
    ) -> tuple[list[int], dict[int, int]]:
        """Codes or bytes read, and true sizes of the values that their targets are too small for,
        by index."""
        codes, left = self._get_whole(keys, at, sizes, end_s)
        true_sizes: dict[int, int] = {}
        if left and time.monotonic() < end_s:
            names = [keys[i] for i in left]
            answers = self._get_any(names, [at[i] for i in left], [sizes[i] for i in left], end_s)
            for i, code in zip(left, answers):
                codes[i] = code
                if code == Code.INVALID_PARAMS:
                    true_sizes[i] = int(self._store.get_size(keys[i]))
        return codes, true_sizes

    def _get_whole(
        self, keys: list[str], at: list[int], sizes: list[int], end_s: float
    ) -> tuple[list[int], list[int]]:
        """Values in memory that have just the sizes of their targets, by a session: it moves a
        batch as one and sleeps, where ``batch_get_into`` goes value by value and spins.

        Returns:
            Codes, and the indices that are to be asked for in the other way: a value that is on an
            SSD, has another size or was replaced, a failed transfer, and a session that another
            lane has ended, with its own on the same key.
        """
        store = self._store
        codes = self._again(len(keys), lambda: store.batch_get_session_start(keys), end_s)
        found = [i for i, code in enumerate(codes) if code == Code.OK]
        left = [i for i, code in enumerate(codes) if code != Code.OK and code not in _NO_VALUE]
        if not found:
            return codes, left
        names = [keys[i] for i in found]
        places, whole = [[at[i]] for i in found], [[sizes[i]] for i in found]
        try:
            moved = store.batch_get_into_multi_buffer_ranges(
                names, places, whole, [[0]] * len(found)
            )
        finally:
            store.batch_get_session_end(names)
        # A delete by force during the read gives the memory to others: then it is no value.
        replicas = store.batch_get_replica_desc(names)
        for i, code in zip(found, moved):
            if code == sizes[i] == _size_in_memory(replicas.get(keys[i], ())):
                codes[i] = code
            else:
                codes[i] = min(code, int(Code.LEASE_EXPIRED))
                left.append(i)
        return codes, left

    def _get_any(self, keys: list[str], at: list[int], sizes: list[int], end_s: float) -> list[int]:
        """Codes of values wherever they are, over new connections where the old ones broke."""
        codes = self._again(len(keys), lambda: self._store.batch_get_into(keys, at, sizes), end_s)
        read = [i for i, code in enumerate(codes) if code >= 0]
        if read:
            for i, there in zip(read, self.exists([keys[i] for i in read], end_s)):
                if there != 1:
                    codes[i] = Code.OBJECT_NOT_FOUND if there == 0 else there
        return codes

    def put(self, keys: list[str], at: list[int], sizes: list[int], end_s: float) -> list[int]:
        """Codes; of a key that is there already, OK.

        A session and no ``batch_put_from``, which answers 0 for a key whose put began and
        never ended, though nothing can be read then."""
        with self._lock:
            ours = [key for key in keys if key not in self._putting]
            self._putting.update(ours)
        try:
            where = {key: (address, size) for key, address, size in zip(keys, at, sizes)}
            begun = self._begin(ours, [where[key][1] for key in ours], end_s)
            self._fill(begun, where, end_s)
            broken = [key for key, code in begun.items() if code == Code.TRANSFER_FAIL]
            if broken and time.monotonic() < end_s:
                # Over a new connection, or to another lender.
                again = self._begin(broken, [where[key][1] for key in broken], end_s)
                self._fill(again, where, end_s)
                begun.update(again)
        finally:
            with self._lock:
                self._putting.difference_update(ours)
        codes = [begun.get(key, int(Code.OBJECT_ALREADY_EXISTS)) for key in keys]
        self._await_others(keys, codes, end_s)
        return codes

    def _begin(self, keys: list[str], sizes: list[int], end_s: float) -> dict[str, int]:
        def start(names: list[str]) -> list[int]:
            wanted = [sizes[keys.index(name)] for name in names]
            return self._again(
                len(names),
                lambda: self._store.batch_put_session_start(names, wanted, self._config),
                end_s,
            )

        begun = dict(zip(keys, start(keys))) if keys else {}
        left = [key for key, code in begun.items() if code == Code.INVALID_PARAMS]
        if left:
            # A session that could not be ended: the master was away.
            self._store.batch_put_session_revoke(left)
            begun.update(zip(left, start(left)))
        return begun

    def _fill(self, begun: dict[str, int], where: dict[str, tuple[int, int]], end_s: float) -> None:
        """Move the bytes of what has begun and publish it; ``begun`` gets the codes."""
        keys = [key for key, code in begun.items() if code == Code.OK]
        if not keys:
            return
        moved = self._store.batch_put_from_multi_buffer_ranges(
            keys,
            [[where[key][0]] for key in keys],
            [[where[key][1]] for key in keys],
            [[0]] * len(keys),
        )
        whole = [key for key, nbytes in zip(keys, moved) if nbytes == where[key][1]]
        begun.update(
            (key, min(nbytes, int(Code.TRANSFER_FAIL)))
            for key, nbytes in zip(keys, moved)
            if nbytes != where[key][1]
        )
        if whole:
            ends = self._again(len(whole), lambda: self._store.batch_put_session_end(whole), end_s)
            begun.update(zip(whole, ends))
            doubtful = [key for key in whole if begun[key] != Code.OK]
            if doubtful:
                # Ended all the same, and only the answer was lost?
                for key, there in zip(doubtful, self.exists(doubtful, end_s)):
                    begun[key] = Code.OK if there == 1 else begun[key]
        failed = [key for key in keys if begun[key] != Code.OK]
        if failed:
            # An end here would publish what is not whole.
            self._store.batch_put_session_revoke(failed)

    def _await_others(self, keys: list[str], codes: list[int], end_s: float) -> None:
        """A key that another one is putting is there in a moment, or never."""
        end_s = min(end_s, time.monotonic() + _OTHERS_PUT_LIMIT_S)
        while True:
            others = [i for i, code in enumerate(codes) if code == Code.OBJECT_ALREADY_EXISTS]
            if not others:
                return
            for i, there in zip(others, self.exists([keys[i] for i in others], end_s)):
                if there:
                    codes[i] = Code.OK if there == 1 else there
            if time.monotonic() > end_s:
                return
            if Code.OBJECT_ALREADY_EXISTS in codes:
                time.sleep(0.005)

    def _again(self, count: int, call: Callable[[], list[int]], end_s: float) -> list[int]:
        """``call`` for ``count`` keys, a second time when its connection had died.

        The library takes 4 s to find that nothing listens; we ask first once it has failed.
        """
        for turn in range(2):
            if self._master_failed and not self._master_listens():
                return [int(Code.RPC_FAIL)] * count
            codes = list(call())
            self._master_failed = not AWAY.isdisjoint(codes)
            if not self._master_failed or turn or time.monotonic() + _RETRY_AFTER_S > end_s:
                break
            time.sleep(_RETRY_AFTER_S)
        return codes

    def _master_listens(self) -> bool:
        try:
            socket.create_connection(self._master, timeout=_LISTENS_LIMIT_S).close()
        except OSError:
            return False
        return True


def _size_in_memory(replicas: Sequence[Any]) -> int:
    """Bytes of a value, of its replicas' descriptors; -1 when none is in memory."""
    for replica in replicas:
        if replica.is_memory_replica():
            return int(replica.get_memory_descriptor().buffer_descriptor.size)
    return -1
