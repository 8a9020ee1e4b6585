"""Digests of files by content, remembered while a file is provably the same."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import tempfile
from pathlib import Path

from lmcache_core.sdk import ConfigError

_IRRELEVANT = (
    ".*", "readme*", "license*", "*.md", "tokenizer*", "special_tokens_map.json", "vocab.*",
    "merges.txt", "generation_config.json", "chat_template*",
)  # fmt: skip
_BLOCK_BYTES = 8 << 20


class FileDigestCache:
    """SHA-256 of files, valid while inode, size and both times are the same.

    Args:
        path: a JSON file that keeps it between processes, or None.  An unreadable file is
            ignored and written anew; one that can't be written is left.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[str, list[object]] = {}
        self._changed = False
        if path is not None:
            try:
                loaded = json.loads(path.read_text())
                self._entries = {k: v for k, v in loaded.items() if isinstance(v, list)}
            except (OSError, ValueError, AttributeError):
                self._entries = {}

    def digest(self, path: Path) -> str:
        """SHA-256 of the file, in hex."""
        real = os.path.realpath(path)
        stat = os.stat(real)
        stamp = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        known = self._entries.get(real)
        if known is not None and known[:-1] == stamp:
            return str(known[-1])
        found = _sha256(real)
        self._entries[real] = [*stamp, found]
        self._changed = True
        return found

    def save(self) -> None:
        """Write to ``path``, atomically, 0600."""
        if self._path is None or not self._changed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd, name = tempfile.mkstemp(dir=self._path.parent)
            with os.fdopen(fd, "w") as file:
                json.dump(self._entries, file)
            os.replace(name, self._path)
        except OSError:
            # A cache of digests: without it the next start hashes again.
            return
        self._changed = False


def content_digest(path: Path, *, cache: FileDigestCache | None = None) -> str:
    """SHA-256 over the sorted (relative name, size, SHA-256) of every file that matters.

    Left out are dot files, tokenizer, licence and documentation files: token ids are what
    is hashed into keys, so a tokenizer changes nothing.  Links are followed.

    Raises:
        ConfigError: nothing is there.
    """
    cache = cache or FileDigestCache(None)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if _matters(path, p))
    if not files:
        raise ConfigError(f"{path} holds no files to identify", hint="give the weights' directory")
    total = hashlib.sha256()
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        line = f"{name}\0{file.stat().st_size}\0{cache.digest(file)}\n"
        total.update(line.encode())
    cache.save()
    return total.hexdigest()


def _matters(root: Path, path: Path) -> bool:
    if not path.is_file():
        return False
    parts = path.relative_to(root).parts
    if any(part.startswith(".") for part in parts):
        return False
    return not any(fnmatch.fnmatch(path.name.lower(), pattern) for pattern in _IRRELEVANT)


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
