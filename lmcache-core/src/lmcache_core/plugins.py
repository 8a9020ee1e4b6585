"""Finding backends: entry points by scheme, version checks, probe, open.

Nothing is loaded to know what is installed.  Each backend gets a plugin manager of its
own, so a broken one hurts only itself.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any, cast

import pluggy

from lmcache_core.sdk import (
    API_VERSION,
    BACKEND_GROUP,
    OPTIONAL_PROTOCOLS,
    BackendHooks,
    BackendInfo,
    ConfigError,
    HostServices,
    LMCacheError,
    Probe,
    RemoteConnector,
)
from lmcache_core.sdk.hookspecs import PROJECT
from lmcache_core.url import redact, split_options

CORE = "lmcache-core"
PROBE_LIMIT_S = 2.0
KNOWN = {
    **dict.fromkeys(("redis", "rediss", "unix"), "lmcache-backend-redis"),
    **dict.fromkeys(("redis+cluster", "redis+sentinel"), "lmcache-backend-redis"),
    "mooncake": "lmcache-backend-mooncake[cpu]",
    "infinistore": "lmcache-backend-infinistore[client]",
    "gds": "lmcache-backend-gds",
    "nixl+posix": "lmcache-backend-nixl[cu12]",
    "nixl+obj": "lmcache-backend-nixl[obj]",
}
"""Scheme -> what to install for it, of the backends that this project keeps."""
_HOOKS = ("lmcache_backend_info", "lmcache_probe", "lmcache_open_connector")

EntryPoints = Callable[[], Iterable[metadata.EntryPoint]]


def _entry_points() -> Iterable[metadata.EntryPoint]:
    return metadata.entry_points(group=BACKEND_GROUP)


@dataclass(frozen=True, slots=True)
class BackendRef:
    """An installed backend, known from metadata alone."""

    scheme: str
    module: str
    distribution: str
    version: str
    requires: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Backend:
    """A loaded backend."""

    ref: BackendRef
    info: BackendInfo
    hook: Any


def installed(entry_points: EntryPoints = _entry_points) -> dict[str, BackendRef]:
    """Every installed scheme, sorted; loads nothing.

    Raises:
        ConfigError: two distributions claim one scheme.
    """
    found: dict[str, BackendRef] = {}
    for entry in entry_points():
        dist = entry.dist
        name, version = (dist.name, dist.version) if dist else ("unknown", "0")
        requires = tuple(dist.requires or ()) if dist else ()
        ref = BackendRef(entry.name, entry.value, name, version, requires)
        other = found.setdefault(entry.name, ref)
        if (other.distribution, other.module) != (ref.distribution, ref.module):
            raise ConfigError(
                f"scheme {entry.name}:// is claimed by {other.distribution} and by {name}",
                hint=f"uninstall one: pip uninstall {name}",
            )
    return dict(sorted(found.items()))


def load(scheme: str, entry_points: EntryPoints = _entry_points) -> Backend:
    """Import and check the backend of ``scheme``.

    Raises:
        ConfigError: not installed, made for another core, or broken; the hint is the fix.
    """
    refs = installed(entry_points)
    ref = refs.get(scheme)
    if ref is None:
        raise _unknown(scheme, list(refs))
    _check_requirement(ref)
    module = _import(ref)
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(BackendHooks)
    try:
        manager.register(module, name=ref.module)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise _broken(ref, str(error), _near_hook(str(error))) from error
    for name in _HOOKS:
        if not getattr(manager.hook, name).get_hookimpls():
            raise _broken(ref, f"{ref.module} does not implement {name}", f"add @hookimpl {name}")
    info = manager.hook.lmcache_backend_info()
    if not isinstance(info, BackendInfo):
        raise _broken(ref, f"lmcache_backend_info gave {type(info).__name__}", "BackendInfo")
    if info.api_min[0] != API_VERSION[0] or tuple(info.api_min) > API_VERSION:
        raise _needs_newer(ref, f"it needs contract {'.'.join(map(str, info.api_min))}")
    return Backend(ref, info, manager.hook)


def open_connector(
    url: str, host: HostServices, entry_points: EntryPoints = _entry_points
) -> RemoteConnector:
    """Open the data path of ``url``.

    Raises:
        ConfigError: see `load`; a wrong option; a capability without its protocol.
        BackendUnavailable: the store can't be reached now.
    """
    backend = load(_scheme(url), entry_points)
    bare, options = split_options(url, backend.info.options, backend.info.name)
    try:
        opened = backend.hook.lmcache_open_connector(url=bare, options=options, host=host)
    except LMCacheError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{redact(url)} can't be opened: {error!r}",
            backend=backend.info.name,
            op="open",
            hint="lmc backends shows what the backend needs",
        ) from error
    if not isinstance(opened, RemoteConnector):
        raise _broken(backend.ref, f"open gave {type(opened).__name__}", "return a RemoteConnector")
    for flag, protocol in OPTIONAL_PROTOCOLS.items():
        if getattr(opened.capabilities, flag) and not isinstance(opened, protocol):
            opened.close()
            raise _broken(
                backend.ref,
                f"capability {flag} is claimed without {protocol.__name__}",
                f"implement {protocol.__name__}, or do not claim {flag}",
            )
    return opened


def install_line(scheme: str) -> str:
    """The command that installs a backend of `KNOWN`."""
    requirement = KNOWN[scheme]
    # Shells take brackets for patterns.
    return f"pip install '{requirement}'" if "[" in requirement else f"pip install {requirement}"


def probe(url: str) -> Probe:
    """Ask the backend of ``url``, in a child process that is killed after 2 s."""
    code = (
        "import json,sys;from lmcache_core import plugins;"
        "p=plugins.probe_here(sys.argv[1]);"
        "print(json.dumps([p.usable,p.reason,p.hint]))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, url],
            capture_output=True,
            text=True,
            timeout=PROBE_LIMIT_S,
        )
        usable, reason, hint = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return Probe(usable=False, reason=f"the probe took more than {PROBE_LIMIT_S} s")
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return Probe(usable=False, reason=f"the probe failed: {last}")
    return Probe(usable=bool(usable), reason=str(reason), hint=str(hint))


def probe_here(url: str) -> Probe:
    """`probe`, in this process; without a time limit."""
    try:
        backend = load(_scheme(url))
        bare, options = split_options(url, backend.info.options, backend.info.name)
    except ConfigError as error:
        return Probe(usable=False, reason=error.message, hint=error.hint)
    return cast(Probe, backend.hook.lmcache_probe(url=bare, options=options))


def _scheme(url: str) -> str:
    scheme, colon, _ = url.partition(":")
    if not colon:
        raise ConfigError(f"{redact(url)!r} is not a URL", hint="write scheme://...")
    return scheme


def _unknown(scheme: str, known: list[str]) -> ConfigError:
    other = _other_major(scheme)
    if other is not None:
        hint = f'its entry point is for another contract; pip install -U "{CORE}" "{other}"'
    elif scheme in KNOWN:
        hint = install_line(scheme)
    else:
        near = difflib.get_close_matches(scheme, [*known, *KNOWN], 1)
        hint = f"did you mean {near[0]}://?" if near else f"installed are {', '.join(known)}"
    return ConfigError(f"no backend serves {scheme}://", op="open", hint=hint)


def _other_major(scheme: str) -> str | None:
    """The distribution that serves ``scheme`` under a contract of another major."""
    family = BACKEND_GROUP.rpartition(".")[0]
    for entry in metadata.entry_points(name=scheme):
        if entry.group.startswith(f"{family}.v") and entry.group != BACKEND_GROUP and entry.dist:
            return entry.dist.name
    return None


def _import(ref: BackendRef) -> ModuleType:
    try:
        return importlib.import_module(ref.module)
    except ImportError as error:
        if "lmcache_core.sdk" in str(error):
            raise _needs_newer(ref, str(error)) from error
        raise _broken(
            ref, f"{ref.module} can't be imported: {error}", f"pip install -U {ref.distribution}"
        ) from error
    except Exception as error:
        raise _broken(
            ref, f"{ref.module} failed at import: {error!r}", f"pip install -U {ref.distribution}"
        ) from error


def _check_requirement(ref: BackendRef) -> None:
    if ref.distribution == CORE:
        return
    for line in ref.requires:
        match = re.match(r"\s*([A-Za-z0-9_.-]+)\s*([^;]*)", line)
        if match is None or match[1].lower().replace("_", "-") != CORE:
            continue
        ours = _numbers(metadata.version(CORE))
        for op, text in re.findall(r"(>=|<=|==|~=|>|<)\s*([0-9.]+)", match[2]):
            if not _satisfies(ours, op, _numbers(text)):
                older = op in ("<", "<=", "==", "~=") and _numbers(text) < ours
                fix = ref.distribution if older else f"{CORE}{match[2].strip()}"
                raise _needs_newer(ref, f"it requires {line.strip()}", fix)


def _satisfies(ours: tuple[int, ...], op: str, theirs: tuple[int, ...]) -> bool:
    width = max(len(ours), len(theirs))
    a, b = ours + (0,) * (width - len(ours)), theirs + (0,) * (width - len(theirs))
    if op == "~=":
        return a >= b and a[: len(theirs) - 1] == b[: len(theirs) - 1]
    answers = {">=": a >= b, "<=": a <= b, "==": a == b, ">": a > b, "<": a < b}
    return answers[op]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _needs_newer(ref: BackendRef, why: str, fix: str = CORE) -> ConfigError:
    return ConfigError(
        f"{ref.distribution} {ref.version} does not fit this core: {why}",
        backend=ref.scheme,
        op="load",
        hint=f'pip install -U "{fix}"',
    )


def _broken(ref: BackendRef, message: str, hint: str) -> ConfigError:
    text = f"{ref.distribution} {ref.version} ({_file_of(ref)}): {message}"
    return ConfigError(text, backend=ref.scheme, op="load", hint=hint)


def _file_of(ref: BackendRef) -> str:
    """The plugin module's file, or its name when it has none."""
    try:
        spec = importlib.util.find_spec(ref.module)
    except (ImportError, ValueError):
        spec = None
    return spec.origin if spec is not None and spec.origin else ref.module


def _near_hook(message: str) -> str:
    match = re.search(r"hook ['\"]?(\w+)", message)
    near = difflib.get_close_matches(match[1], _HOOKS, 1) if match else []
    return f"did you mean {near[0]}?" if near else f"hooks are {', '.join(_HOOKS)}"
