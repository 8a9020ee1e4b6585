"""State in one SQLite file, for one controller."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from lmcache_core.controller.state import GONE_KEPT_S, MEMORY, Changes, Document
from lmcache_core.sdk import BackendUnavailable, ConfigError

SCHEMA = 1
_PURGE_EVERY = 256
_COLUMNS = "kind, id, value, version, expires_s"
_TABLES = """
CREATE TABLE documents (
    kind TEXT NOT NULL, id TEXT NOT NULL, value BLOB, version INTEGER NOT NULL, expires_s REAL,
    PRIMARY KEY (kind, id)
);
CREATE INDEX by_version ON documents (version);
CREATE INDEX by_expiry ON documents (expires_s) WHERE expires_s IS NOT NULL;
CREATE TABLE store (epoch TEXT NOT NULL, version INTEGER NOT NULL);
"""


class SqliteState:
    """See `State`.  Written through on every put; the file is this process's alone until `close`.

    Args:
        path: of the file, made readable for this user only; ``:memory:`` keeps nothing.
        wall_s: Unix time.

    Raises:
        ConfigError: it can't be made or read, others can read it, another process has it, or a
            later version made it.
    """

    shared = False

    def __init__(self, path: str, *, wall_s: Callable[[], float] = time.time) -> None:
        self.address = path
        self._wall_s = wall_s
        self._lock = threading.Lock()
        self._puts = 0
        self._db: sqlite3.Connection | None = None
        if path != MEMORY:
            _make_private(path)
        try:
            self._db = sqlite3.connect(
                path, timeout=0.0, isolation_level=None, check_same_thread=False
            )
            # Exclusive: a second controller would hand out the same work from old memory.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._prepare(self._db)
        except sqlite3.Error as error:
            if self._db is not None:
                self._db.close()
            raise _wrong_file(path, error) from error
        except ConfigError:
            self.close()
            raise

    def get(self, kind: str, id: str) -> Document | None:
        """See `State`."""
        with self._transaction() as db:
            return self._found(db, kind, id)

    def put(
        self, kind: str, id: str, value: bytes, *, expect: int | None, ttl_s: float | None = None
    ) -> int | None:
        """See `State`."""
        with self._transaction() as db:
            if expect is not None:
                found = self._found(db, kind, id)
                if (found.version if found else 0) != expect:
                    return None
            return self._write(db, kind, id, value, ttl_s)

    def put_all(self, kind: str, values: dict[str, bytes]) -> list[int]:
        """See `State`."""
        with self._transaction() as db:
            return [self._write(db, kind, id, value, None) for id, value in values.items()]

    def delete(self, kind: str, id: str) -> None:
        """See `State`."""
        with self._transaction() as db:
            if self._found(db, kind, id) is not None:
                self._write(db, kind, id, None, GONE_KEPT_S)

    def changes(self, kinds: Sequence[str], *, after: int, limit: int) -> Changes:
        """See `State`."""
        marks = ",".join("?" * len(kinds))
        with self._transaction() as db:
            (epoch,) = db.execute("SELECT epoch FROM store").fetchone()
            rows = db.execute(
                f"SELECT {_COLUMNS} FROM documents WHERE version > ? AND kind IN ({marks})"
                " AND (expires_s IS NULL OR expires_s > ?) ORDER BY version LIMIT ?",
                (after, *kinds, self._wall_s(), limit),
            )
            return Changes(epoch, [Document(*row) for row in rows])

    def count(self, kind: str) -> int:
        """See `State`."""
        with self._transaction() as db:
            query = "SELECT COUNT(*) FROM documents WHERE kind = ? AND value IS NOT NULL"
            (found,) = db.execute(query, (kind,)).fetchone()
            return int(found)

    def close(self) -> None:
        """See `State`."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._db is None:
                raise BackendUnavailable("the state is closed", op="state")
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                if self._db.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")
                raise BackendUnavailable(
                    f"the state in {self.address} failed: {error}",
                    op="state",
                    hint="is its disk full or gone?",
                ) from error

    def _found(self, db: sqlite3.Connection, kind: str, id: str) -> Document | None:
        row = db.execute(
            f"SELECT {_COLUMNS} FROM documents WHERE kind = ? AND id = ? AND value IS NOT NULL"
            " AND (expires_s IS NULL OR expires_s > ?)",
            (kind, id, self._wall_s()),
        ).fetchone()
        return None if row is None else Document(*row)

    def _write(
        self, db: sqlite3.Connection, kind: str, id: str, value: bytes | None, ttl_s: float | None
    ) -> int:
        db.execute("UPDATE store SET version = version + 1")
        (version,) = db.execute("SELECT version FROM store").fetchone()
        expires_s = None if ttl_s is None else self._wall_s() + ttl_s
        db.execute(
            f"INSERT OR REPLACE INTO documents ({_COLUMNS}) VALUES (?, ?, ?, ?, ?)",
            (kind, id, value, version, expires_s),
        )
        self._puts += 1
        if self._puts % _PURGE_EVERY == 0:
            db.execute("DELETE FROM documents WHERE expires_s <= ?", (self._wall_s(),))
        return int(version)

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute("BEGIN EXCLUSIVE")
        (found,) = db.execute("PRAGMA user_version").fetchone()
        if found > SCHEMA:
            db.execute("ROLLBACK")
            raise ConfigError(
                f"{self.address} was made by a later version (schema {found})",
                op="controller",
                hint="update lmcache-core, or name another file with --state",
            )
        if found < SCHEMA:
            for statement in _TABLES.strip().split(";\n"):
                db.execute(statement)
            db.execute("INSERT INTO store VALUES (?, 0)", (secrets.token_hex(8),))
            db.execute(f"PRAGMA user_version = {SCHEMA}")
        db.execute("DELETE FROM documents WHERE expires_s <= ?", (self._wall_s(),))
        db.execute("COMMIT")


def _make_private(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            mode = stat.S_IMODE(os.fstat(fd).st_mode)
        finally:
            os.close(fd)
    except OSError as error:
        raise ConfigError(
            f"the state {path} can't be opened: {error.strerror}",
            op="controller",
            hint="name a file in a directory of your own with --state",
        ) from error
    if mode & 0o077:
        raise ConfigError(
            f"others can read the state {path}", op="controller", hint=f"chmod 600 {path}"
        )


def _wrong_file(path: str, error: sqlite3.Error) -> ConfigError:
    if "locked" in str(error):
        return ConfigError(
            f"another controller has the state {path}",
            op="controller",
            hint="stop it, name another file with --state, or share state in Redis",
        )
    return ConfigError(
        f"{path} is no state of a controller: {error}",
        op="controller",
        hint="name another file with --state",
    )
