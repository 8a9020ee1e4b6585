"""``nixl+posix:///absolute/directory``: the files of ``file://``, moved by NIXL's POSIX plugin.

A batch is one transfer over all its files.  Where that fails, each key is tried alone with plain
system calls: they either do it, or say why not, which the library does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from lmcache_backend_nixl.batches import BatchConnector, Finish
from lmcache_backend_nixl.library import Agent, Piece, TransferFailed
from lmcache_core.sdk import (
    Buffer,
    Capabilities,
    Durability,
    GetResult,
    Health,
    HostServices,
    MemoryKind,
    OpContext,
    ScanEntry,
    Sharing,
    Status,
    ValueFiles,
    status_of_oserror,
)

PAGE = 4096
_READ = os.O_RDONLY | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


@dataclass(slots=True)
class _Open(Piece):
    """One file of a batch; its descriptor is the ``device``, -1 once it is closed.

    Attributes:
        index: of its key.
        publication: ends in publishing the file, or in removing it; None of a file to read.
    """

    index: int = 0
    path: str = ""
    publication: ExitStack | None = None


class PosixConnector(BatchConnector[Agent]):
    """Thread-safe up to ``lanes`` calls; between processes too.

    Args:
        files: where the values are.
        make: a new agent.
        lanes: calls at the same time.
        direct: the files are opened with O_DIRECT; buffers are multiples of 4 KiB then.
        host: services of core.
    """

    def __init__(
        self,
        files: ValueFiles,
        make: Callable[[], Agent],
        *,
        lanes: int,
        direct: bool,
        host: HostServices,
    ) -> None:
        super().__init__(make, lanes=lanes, host=host, bounced=False)
        self._files = files
        self._read_flags = _READ | (os.O_DIRECT if direct else 0)
        self._write_flags = _WRITE | (os.O_DIRECT if direct else 0)
        self._fell_back = host.counter("nixl.plain_transfers")
        self.capabilities = capabilities(files.sync, lanes=lanes, direct=direct)

    def exists(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        self.check_call(keys, "exists")

        def one(key: bytes) -> Status:
            return Status.OK if self._files.exists(key) else Status.MISS

        return self._names(keys, one, ctx)

    def delete(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        self.check_call(keys, "delete")

        def one(key: bytes) -> Status:
            try:
                self._files.delete(key)
            except FileNotFoundError:
                pass
            return Status.OK

        return self._names(keys, one, ctx)

    def scan(self, prefix: bytes, ctx: OpContext) -> Iterator[ScanEntry]:
        """Every value whose key starts with ``prefix``."""
        self.check_call((), "scan")
        return self._files.scan(prefix)

    def health(self, ctx: OpContext) -> Health:
        self.check_call((), "health")
        return self._look(lambda lane: self._files.health(), ctx)

    def _names(
        self, keys: Sequence[bytes], one: Callable[[bytes], Status], ctx: OpContext
    ) -> list[Status]:
        """What needs no transfer, key after key."""

        def work(lane: Agent) -> list[Status]:
            return [self._timely(partial(one, key), ctx) for key in keys]

        return self._run(work, len(keys), Status.TIMED_OUT, Status.TIMED_OUT, (), ctx)

    def _read(
        self, lane: Agent, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> Finish:
        results = [GetResult(Status.TIMED_OUT)] * len(keys)
        found: list[_Open] = []
        try:
            for index, (key, target) in enumerate(zip(keys, targets)):
                answer = self._open_value(index, key, target, ctx)
                if isinstance(answer, _Open):
                    found.append(answer)
                else:
                    results[index] = answer
            whole = GetResult(Status.OK)
            for file, status in zip(found, self._move(lane, "READ", found, targets, ctx)):
                if status is not Status.OK:
                    results[file.index] = GetResult(status)
                    continue
                if whole.nbytes != file.nbytes:
                    whole = GetResult(Status.OK, file.nbytes)
                results[file.index] = whole  # one for all that are of one size
        finally:
            for file in found:
                os.close(file.device)
        return lambda: results

    def _write(
        self, lane: Agent, keys: Sequence[bytes], sources: Sequence[Buffer], ctx: OpContext
    ) -> list[Status]:
        results = [Status.TIMED_OUT] * len(keys)
        made: list[_Open] = []
        try:
            for index, (key, source) in enumerate(zip(keys, sources)):
                answer = self._new_value(index, key, source, ctx)
                if isinstance(answer, _Open):
                    made.append(answer)
                else:
                    results[index] = answer
            for file, status in zip(made, self._move(lane, "WRITE", made, sources, ctx)):
                results[file.index] = self._finish(file, status)
        finally:
            for file in made:
                # Published already, unless something broke.
                _discard(file)
        return results

    def _open_value(
        self, index: int, key: bytes, target: Buffer, ctx: OpContext
    ) -> _Open | GetResult:
        """The file of a value that fits, or the answer."""
        if not self._usable(target):
            return GetResult(Status.REJECTED)
        if self._clock() >= ctx.deadline_s:
            return GetResult(Status.TIMED_OUT)
        path = self._files.path(key)
        fd = -1
        try:
            fd = os.open(path, self._read_flags)
            nbytes = os.lseek(fd, 0, os.SEEK_END)  # a third of what a stat takes
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            return GetResult(status_of_oserror(error))
        if 0 < nbytes <= target.nbytes:
            return _Open(target.address, nbytes, fd, index=index, path=path)
        os.close(fd)
        return GetResult(Status.SIZE_MISMATCH if nbytes else Status.OK, nbytes)

    def _new_value(self, index: int, key: bytes, source: Buffer, ctx: OpContext) -> _Open | Status:
        """A new file to write, or the answer."""
        if not self._usable(source) or source.nbytes > self.capabilities.max_value_bytes:
            return Status.REJECTED
        if ctx.remaining_s(self._clock()) <= 0:
            return Status.TIMED_OUT
        publication = ExitStack()
        try:
            path = publication.enter_context(self._files.publishing(key))
            try:
                fd = os.open(path, self._write_flags, 0o600)
            except OSError as error:
                _undo(publication, error)
                return status_of_oserror(error)
        except OSError as error:
            return status_of_oserror(error)
        return _Open(
            source.address, source.nbytes, fd, index=index, path=path, publication=publication
        )

    def _move(
        self,
        lane: Agent,
        op: str,
        files: Sequence[_Open],
        buffers: Sequence[Buffer],
        ctx: OpContext,
    ) -> list[Status]:
        """Move all of them at once; one by one with plain calls where that fails."""
        pieces = [file for file in files if file.nbytes]
        if not pieces:
            return [Status.OK] * len(files)
        try:
            lane.use_regions(self._regions)
            lane.move(op, pieces, self._clock)
        except TransferFailed:
            self._fell_back.inc(len(files))
            plain = self._plain_read if op == "READ" else self._plain_write
            return [self._timely(partial(plain, file, buffers[file.index]), ctx) for file in files]
        return [Status.OK] * len(files)

    def _plain_read(self, file: _Open, target: Buffer) -> Status:
        if target.view is None:
            return Status.FAILED
        nbytes = self._files.read(file.path, target.view[: file.nbytes])
        # Another one was published meanwhile: what was read is not known to be one put's.
        return Status.OK if nbytes == file.nbytes else Status.FAILED

    def _plain_write(self, file: _Open, source: Buffer) -> Status:
        if source.view is None:
            return Status.FAILED
        self._files.ops.unlink(file.path)
        self._files.write(file.path, source.view)
        return Status.OK

    def _finish(self, file: _Open, status: Status) -> Status:
        """Sync and publish what was written whole."""
        if status is not Status.OK:
            return status
        fd, file.device = file.device, -1
        try:
            try:
                if self._files.sync:
                    os.fdatasync(fd)
            finally:
                os.close(fd)
            if file.publication is not None:
                file.publication.close()
        except OSError as error:
            _undo(file.publication, error)
            return status_of_oserror(error)
        return Status.OK

    def _timely(self, one: Callable[[], Status], ctx: OpContext) -> Status:
        """``one``, unless the deadline has passed."""
        if ctx.remaining_s(self._clock()) <= 0:
            return Status.TIMED_OUT
        try:
            return one()
        except OSError as error:
            return status_of_oserror(error)

    def _usable(self, buffer: Buffer) -> bool:
        """Host and pinned memory, which the plugin can reach."""
        return buffer.memory is not MemoryKind.DEVICE and self.usable_view(buffer) is not None


def capabilities(sync: bool, *, lanes: int, direct: bool) -> Capabilities:
    """What a connector with these settings claims."""
    return Capabilities(
        max_concurrency=lanes,
        max_batch=128,
        max_value_bytes=1 << 40,
        alignment=PAGE if direct else 1,
        memory=frozenset({MemoryKind.HOST, MemoryKind.PINNED}),
        zero_copy=True,
        regions=True,
        scan=True,
        submit=True,
        durability=Durability.HOST if sync else Durability.PROCESS,
        sharing=Sharing.HOST,
    )


def _undo(publication: ExitStack | None, error: BaseException) -> None:
    """Remove the file instead of publishing it."""
    if publication is None:
        return
    try:
        publication.__exit__(type(error), error, error.__traceback__)
    except OSError:
        pass  # it stays among the orphans, which the next put removes


def _discard(file: _Open) -> None:
    if file.device >= 0:
        os.close(file.device)
        file.device = -1
    _undo(file.publication, TransferFailed("not written"))
