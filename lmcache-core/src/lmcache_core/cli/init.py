"""``lmc init``: a commented configuration, sized for this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from urllib.parse import quote

from lmcache_core.sdk import ConfigError

GIB = 1 << 30
MAX_HOST_GIB = 64
"""More takes long to reserve at start; who wants it can write it."""

TEMPLATE = """\
# Configuration of lmcache-core; name this file in LMCACHE_CONFIG_FILE.
# `lmc config show` prints what an engine takes, with the source of every value.

# Tokens in a chunk: what is stored and found again as one.
chunk_size: 256

# Fastest first.  The host tier is reserved in full when the engine starts.
tiers:
  # Half of the {free_gib} GiB of memory that were free, at most {max_gib}.
  - host: {host_gib}GiB
  # 80 % of the {disk_gib} GiB that were free there.  durability=host also survives power loss.
  - url: "file://{path}?durability=process"
    size: {size_gib}GiB
  # A store that several engines share:  pip install lmcache-backend-redis
  # - url: redis://user:password@cache.example:6379/0

# How long a request may wait for what is below host; then it is computed.
lookup_deadline_s: 2.0

# Also store the chunks that decoding fills, so that a conversation goes on from them.
store_decode: true
"""


def render(directory: Path) -> str:
    """The file's text for this machine and a disk tier in ``directory``.

    Raises:
        ConfigError: ``directory`` or its parent is not there, or memory or disk is too small.
    """
    directory = directory.absolute()
    free = free_memory_bytes()
    try:
        disk = shutil.disk_usage(directory if directory.exists() else directory.parent).free
    except OSError as error:
        raise ConfigError(
            f"{directory} can't be used: {error.strerror}", hint="make it, or give another --dir"
        ) from error
    host_gib, size_gib = min(free // 2 // GIB, MAX_HOST_GIB), disk * 8 // 10 // GIB
    if not (host_gib and size_gib):
        raise ConfigError(
            f"{free / GIB:.1f} GiB of memory and {disk / GIB:.1f} GiB of disk are free",
            hint="free at least 2 GiB of each, or give another --dir",
        )
    return TEMPLATE.format(
        free_gib=free // GIB,
        host_gib=host_gib,
        disk_gib=disk // GIB,
        size_gib=size_gib,
        max_gib=MAX_HOST_GIB,
        path=quote(str(directory)),
    )


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that can be had now: the kernel's estimate, which counts its caches, or what a
    container may take when that is less."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) << 10
    limits = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")
    allowed = [int(line) for path in limits for line in _lines(root / path) if line.isdecimal()]
    return min([free, *allowed])


def write(out: Path, text: str, *, force: bool) -> None:
    """Write ``text`` to ``out``, 0600 since URLs may hold passwords.

    Raises:
        ConfigError: ``out`` is there already and not ``force``, or can't be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if force else os.O_EXCL)
    try:
        fd = os.open(out, flags, 0o600)
    except FileExistsError:
        raise ConfigError(f"{out} is there already", hint="--force replaces it") from None
    except OSError as error:
        raise ConfigError(f"{out} can't be written: {error.strerror}", hint="give --out") from error
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
