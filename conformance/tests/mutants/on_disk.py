"""Wrong files: mutants of the file connector."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace

from lmcache_core.connectors.file import FileConnector
from lmcache_core.sdk import BatchLoop, GetResult, OsFileOps, Status
from mutants.catalogue import mutant

Base = FileConnector


@mutant("A9")
class WorldReadable(Base):
    """Its files and directories can be read by anybody."""

    def put_one(self, key, source, timeout_s):
        super().put_one(key, source, timeout_s)
        os.chmod(self._files.path(key), 0o644)
        os.chmod(os.path.dirname(self._files.path(key)), 0o755)


@mutant("B8")
class AnswersFromItsCache(Base):
    """It keeps values in memory and writes another one to the disk."""

    def __init__(self, root, **options):
        super().__init__(root, **options)
        self._cache = {}

    def put_one(self, key, source, timeout_s):
        super().put_one(key, memoryview(bytes(len(source))), timeout_s)
        self._cache[key] = bytes(source)

    def get_one(self, key, target, timeout_s):
        found = super().get_one(key, target, timeout_s)
        if found and key in self._cache:
            target[:found] = self._cache[key]
        return found


@mutant("B9")
class ListsWhatIsThere(Base):
    """A scan gives the size of one block."""

    def scan(self, prefix, ctx):
        for entry in super().scan(prefix, ctx):
            yield replace(entry, nbytes=4096)


@mutant("G5")
class WritesAfterTimedOut(Base):
    """It says TIMED_OUT for a buffer that a thread still reads into."""

    def get_into(self, keys, targets, ctx):
        found = super().get_into(keys, targets, ctx)
        timed_out = GetResult(Status.TIMED_OUT)
        return [timed_out if each.status is Status.ABANDONED else each for each in found]


@mutant("G5")
class NeverReleases(Base):
    """It says ABANDONED and never gives the buffer back."""

    def __init__(self, root, **options):
        super().__init__(root, **{**options, "released": lambda token: None})


@mutant("H4")
class WaitsForTheDisk(Base):
    """A call lasts as long as the disk stands still."""

    _each = BatchLoop._each


@mutant("H7")
class SwallowsErrors(Base):
    """An I/O error is called a miss."""

    def get_one(self, key, target, timeout_s):
        try:
            return super().get_one(key, target, timeout_s)
        except OSError:
            return None


@mutant("H7")
class OkInSpiteOfErrors(Base):
    """A put whose write failed is OK."""

    def put_one(self, key, source, timeout_s):
        try:
            super().put_one(key, source, timeout_s)
        except OSError:
            pass


@mutant("H7")
class RaisesErrors(Base):
    """An OSError escapes from the connector."""

    def _answer(self, key, ctx, one, wrap):
        return one(key, 1.0) if ctx.remaining_s() else None


@mutant("H8")
class WritesInPlace(Base):
    """A put writes over the file that is there."""

    def put_one(self, key, source, timeout_s):
        self._files._make_shard(key)
        ops = self._files.ops
        fd = ops.open(self._files.path(key), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            ops.pwrite(fd, source, 0)
        finally:
            ops.close(fd)


@mutant("H8")
class LeavesTemporaryFiles(Base):
    """A put that fails leaves its temporary file."""

    def __init__(self, root, **options):
        super().__init__(root, **options)
        self._files.remove_orphans = self._files._orphans.clear


@mutant("H9")
class DeletesOnEmfile(Base):
    """A value that can't be opened is deleted as damaged."""

    def get_one(self, key, target, timeout_s):
        try:
            return super().get_one(key, target, timeout_s)
        except OSError:
            os.unlink(self._files.path(key))
            return None


@mutant("H11")
class ClaimsChecksums(Base):
    """It claims checksums and has none."""

    def __init__(self, root, **options):
        super().__init__(root, **options)
        self.capabilities = replace(self.capabilities, checksums=True)


@mutant("I1")
class WritesAtClose(Base):
    """It writes on close what it acknowledged before."""

    def __init__(self, root, **options):
        super().__init__(root, **options)
        self._late = {}

    def put_one(self, key, source, timeout_s):
        self._late[key] = bytes(source)

    def close(self):
        for key, content in self._late.items():
            super().put_one(key, memoryview(content), 1.0)
        super().close()


@mutant("I2")
class WritesBehind(Base):
    """A thread writes a moment after the answer."""

    def put_one(self, key, source, timeout_s):
        content = memoryview(bytes(source))
        threading.Timer(0.2, lambda: Base.put_one(self, key, content, 1.0)).start()


@mutant("I3")
class PublishesFirst(Base):
    """The name is there before the bytes are."""

    def put_one(self, key, source, timeout_s):
        ops = self._files.ops
        with self._files.publishing(key) as aside:
            fd = ops.open(aside, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            ops.pwrite(fd, source, 0)
        finally:
            ops.close(fd)


@mutant("I3")
class NeverSweeps(Base):
    """What killed writers left stays for ever."""

    def __init__(self, root, **options):
        super().__init__(root, **{**options, "is_alive": lambda pid: True})


class _NoSync(OsFileOps):
    def fsync(self, fd):
        pass


class _NoDirectorySync(OsFileOps):
    def fsync_dir(self, path):
        pass


@mutant("I5")
class NeverSyncs(Base):
    """It claims host and syncs nothing."""

    def __init__(self, root, **options):
        super().__init__(root, **{**options, "durability": "host", "ops": _NoSync()})


@mutant("I5")
class SyncsTheFileOnly(Base):
    """It claims host and does not sync the name."""

    def __init__(self, root, **options):
        super().__init__(root, **{**options, "durability": "host", "ops": _NoDirectorySync()})


@mutant("I6")
class ScansItsMemory(Base):
    """A scan lists what this process has stored."""

    def __init__(self, root, **options):
        super().__init__(root, **options)
        self._mine = set()

    def put_one(self, key, source, timeout_s):
        super().put_one(key, source, timeout_s)
        self._mine.add(key)

    def scan(self, prefix, ctx):
        return (each for each in super().scan(prefix, ctx) if each.key in self._mine)


@mutant("F6")
class SweepsTheLiving(Base):
    """At open it removes the temporary files of every process."""

    def __init__(self, root, **options):
        super().__init__(root, **{**options, "is_alive": lambda pid: False})


@mutant("F4")
class FilePerOpen(Base):
    """Every open leaves a file in the store."""

    def __init__(self, root, **options):
        super().__init__(root, **options)
        with open(f"{root}/v1/tmp/1-{time.monotonic_ns()}", "w"):
            pass
