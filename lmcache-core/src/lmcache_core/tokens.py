"""Token files: what two sides of a connection show each other, readable for one user only."""

from __future__ import annotations

import os
import secrets
import stat

from lmcache_core.sdk import ConfigError

MIN_TOKEN_CHARS = 16


def read_token(file: str) -> str:
    """The token in ``file``.

    Raises:
        ConfigError: it can't be read, others can, or it is too short.
    """
    try:
        with open(file, encoding="utf-8") as opened:
            found = os.fstat(opened.fileno())
            if stat.S_IMODE(found.st_mode) & 0o077 or found.st_uid not in (os.getuid(), 0):
                raise ConfigError(
                    f"others can read the token file {file}", op="token", hint=f"chmod 600 {file}"
                )
            token = opened.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the token file {file} can't be read: {error}",
            op="token",
            hint="lmc token FILE makes one; all who meet get the same",
        ) from error
    if len(token) < MIN_TOKEN_CHARS:
        raise ConfigError(
            f"the token in {file} has less than {MIN_TOKEN_CHARS} characters",
            op="token",
            hint="remove the file; lmc token FILE makes a new one",
        )
    return token


def make_token(file: str) -> str:
    """The token in ``file``, which is made, readable for this user only, when it is not there.

    Raises:
        ConfigError: see `read_token`; or it can't be made.
    """
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return read_token(file)
    except OSError as error:
        raise ConfigError(
            f"the token file {file} can't be made: {error.strerror}",
            op="token",
            hint="name a file in a directory of your own",
        ) from error
    with os.fdopen(fd, "w", encoding="utf-8") as opened:
        opened.write(secrets.token_hex(32) + "\n")
    return read_token(file)
