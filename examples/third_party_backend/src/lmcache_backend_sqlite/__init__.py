"""`sqlite:///absolute/file`: values in one SQLite file."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

from lmcache_core import sdk


class SqliteConnector(sdk.BatchLoop):
    capabilities = sdk.Capabilities(
        max_concurrency=4, max_value_bytes=64 << 20, sharing=sdk.Sharing.HOST
    )

    def __init__(self, path: str) -> None:
        super().__init__("sqlite")
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self._path = path
        with self._db(10.0) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("CREATE TABLE IF NOT EXISTS kv (key BLOB PRIMARY KEY, value BLOB)")

    def exists_one(self, key: bytes, timeout_s: float) -> bool:
        with self._db(timeout_s) as db:
            return db.execute("SELECT 1 FROM kv WHERE key = ?", (key,)).fetchone() is not None

    def get_one(self, key: bytes, target: memoryview, timeout_s: float) -> int | None:
        with self._db(timeout_s) as db:
            row = db.execute("SELECT value FROM kv WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        if len(row[0]) > len(target):
            raise sdk.TargetTooSmall(len(row[0]))
        target[: len(row[0])] = row[0]
        return len(row[0])

    def put_one(self, key: bytes, source: memoryview, timeout_s: float) -> None:
        with self._db(timeout_s) as db:
            db.execute("INSERT OR REPLACE INTO kv VALUES (?, ?)", (key, source))

    def delete_one(self, key: bytes, timeout_s: float) -> None:
        with self._db(timeout_s) as db:
            db.execute("DELETE FROM kv WHERE key = ?", (key,))

    def health(self, ctx: sdk.OpContext) -> sdk.Health:
        self.check_call((), "health")
        return sdk.Health(ok=os.path.exists(self._path), reason=self._path)

    @contextmanager
    def _db(self, timeout_s: float) -> Iterator[sqlite3.Connection]:
        try:
            opened = sqlite3.connect(self._path, timeout=timeout_s, isolation_level=None)
            with closing(opened) as db:
                yield db
        except sqlite3.Error as error:
            raise OSError(errno.EIO, str(error)) from error


@sdk.hookimpl
def lmcache_backend_info() -> sdk.BackendInfo:
    return sdk.BackendInfo(
        name="sqlite",
        version="0.1.0",
        schemes=("sqlite",),
        api_min=(0, 9),
        api_tested=(0, 9),
        url_help="sqlite:///absolute/file",
    )


@sdk.hookimpl
def lmcache_probe(url: str, options: Mapping[str, Any]) -> sdk.Probe:
    folder = os.path.dirname(urlsplit(url).path)
    usable = os.access(folder, os.W_OK)
    return sdk.Probe(usable=usable, reason=f"{folder} can{'' if usable else 'not'} be written")


@sdk.hookimpl
def lmcache_open_connector(
    url: str, options: Mapping[str, Any], host: sdk.HostServices
) -> sdk.RemoteConnector:
    return SqliteConnector(urlsplit(url).path)
