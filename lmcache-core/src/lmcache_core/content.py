"""Digests of weights and adapters by content, remembered while a file is provably the same."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmcache_core.keys import canonical
from lmcache_core.sdk.errors import ConfigError

_CONTENT_DOMAIN = b"lmc:cont"
_SKIPPED = (
    ".*",
    "README*",
    "LICENSE*",
    "*.md",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""Files that do not change a KV page."""
_READ_BYTES = 8 << 20
_SETTLED_NS = 2_000_000_000
_MAX_ENTRIES = 65_536


class FileDigestCache:
    """Remembers the SHA-256 of files, so that weights are read once and not at every start.

    An entry holds only while inode, size, mtime and ctime are unchanged.  A file changed
    within the last 2 s is not remembered: its times can't tell a second change.  A file of
    the cache that is broken, or that others may write, is ignored and rewritten; failing to
    write it is not an error.  One owner thread.

    Args:
        path: JSON file, written atomically with mode 0600; None keeps it in memory.
        now_ns: nanoseconds since the epoch.
    """

    def __init__(self, path: Path | None = None, *, now_ns: Callable[[], int] = time.time_ns):
        self._path = path
        self._now_ns = now_ns
        self._entries: dict[str, list[Any]] = _load_entries(path) if path is not None else {}
        self._dirty = False

    def get(self, path: str, found: os.stat_result) -> str | None:
        """Hex SHA-256 of the file at the real path ``path``, when ``found`` is unchanged."""
        entry = self._entries.get(path)
        if isinstance(entry, list) and len(entry) == 5 and entry[:4] == _stamp(found):
            return str(entry[4])
        return None

    def put(self, path: str, found: os.stat_result, digest: str) -> None:
        """Remember ``digest``, unless the file changed too recently."""
        if self._now_ns() - max(found.st_ctime_ns, found.st_mtime_ns) < _SETTLED_NS:
            return
        self._entries.pop(path, None)
        while len(self._entries) >= _MAX_ENTRIES:
            del self._entries[next(iter(self._entries))]
        self._entries[path] = [*_stamp(found), digest]
        self._dirty = True

    def save(self) -> None:
        """Write the file, if anything changed."""
        if self._path is None or not self._dirty:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fd, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=".digests-")  # 0600
            try:
                with os.fdopen(fd, "w") as file:
                    json.dump({"version": 1, "entries": self._entries}, file)
                os.replace(temporary, self._path)
            except BaseException:
                os.unlink(temporary)
                raise
            self._dirty = False


def _load_entries(path: Path) -> dict[str, list[Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                return {}
            entries = json.load(file)["entries"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _stamp(found: os.stat_result) -> list[int]:
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def content_digest(directory_or_file: Path, *, cache: FileDigestCache | None) -> str:
    """Hex SHA-256 of the weights and config: over each file's relative name, size and SHA-256.

    Symlinks are followed.  Files that do not change a KV page (README, tokenizer, chat
    template, dotfiles, ...) are left out of a directory.

    Raises:
        ConfigError: nothing is there, a file can't be read, or one changed while it was read.
    """
    try:
        files = _files_of(Path(directory_or_file))
        if not files:
            raise ConfigError(f"{directory_or_file} holds no weights", op="identity")
        listing = []
        for name, path in sorted(files.items()):
            size, digest = _file_digest(path, cache)
            listing.append((os.fsencode(name), size, digest))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{directory_or_file} can't be identified: {error}",
            op="identity",
            hint="give a readable directory of weights, or a hub commit hash",
        ) from error
    if cache is not None:
        cache.save()
    return hashlib.sha256(_CONTENT_DOMAIN + canonical(listing)).hexdigest()


def _files_of(top: Path) -> dict[str, str]:
    """Relative name -> real path of the files that count."""
    real = os.path.realpath(top, strict=True)
    if not os.path.isdir(real):
        return {top.name: real}
    files: dict[str, str] = {}

    def walk(directory: str, prefix: str, above: frozenset[str]) -> None:
        for name in os.listdir(directory):
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in _SKIPPED):
                continue
            path = os.path.realpath(os.path.join(directory, name), strict=True)
            if not os.path.isdir(path):
                files[prefix + name] = path
            elif path not in above:  # else a symlink to a directory above
                walk(path, f"{prefix}{name}/", above | {path})

    walk(real, "", frozenset({real}))
    return files


def _file_digest(path: str, cache: FileDigestCache | None) -> tuple[int, str]:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path} is not a regular file", op="identity")
    known = cache.get(path, found) if cache is not None else None
    if known is not None:
        return found.st_size, known
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
        after = os.fstat(file.fileno())
    if _stamp(after) != _stamp(found):
        raise ConfigError(f"{path} changed while it was read", op="identity", hint="try again")
    if cache is not None:
        cache.put(path, found, hasher.hexdigest())
    return found.st_size, hasher.hexdigest()
