"""A: what a backend says of itself, and what it does to the process that imports it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lmcache_conformance.frame import Wrong, check
from lmcache_conformance.memory import Memory, value
from lmcache_conformance.rig import Rig, entry_points_of, within
from lmcache_core import plugins
from lmcache_core.sdk import (
    API_VERSION,
    OPTIONAL_PROTOCOLS,
    BackendClosed,
    BackendUnavailable,
    ConfigError,
    RemoteConnector,
    SupportsScan,
)
from lmcache_core.url import split_options

_IMPORT = """
import json, os, sys, threading, traceback
import importlib.util
import lmcache_core.sdk, lmcache_core.plugins
before, threads, env = set(sys.modules), threading.active_count(), dict(os.environ)
import importlib
module = importlib.import_module(sys.argv[1])
module.lmcache_backend_info()
def native(name):
    origin = getattr(getattr(sys.modules[name], "__spec__", None), "origin", None) or ""
    return ".so" in origin and "lib-dynload" not in origin
print(json.dumps({
    "native": sorted(n for n in set(sys.modules) - before if native(n)),
    "threads": threading.active_count() - threads,
    "environment": sorted(k for k in {*os.environ, *env} if os.environ.get(k) != env.get(k)),
}))
"""


def each_operation(store: RemoteConnector, key: bytes) -> dict[str, Callable[[], object]]:
    """Every method of the data path, ready to be called; for checks of what all must refuse."""
    source, target = Memory.of([value(1, 4096)]), Memory([4096])
    calls: dict[str, Callable[[], object]] = {
        "exists": lambda: store.exists([key], within(5)),
        "get_into": lambda: store.get_into([key], target.buffers(), within(5)),
        "put_from": lambda: store.put_from([key], source.buffers(read_only=True), within(5)),
        "delete": lambda: store.delete([key], within(5)),
        "health": lambda: store.health(within(5)),
    }
    if isinstance(store, SupportsScan) and store.capabilities.scan:
        calls["scan"] = lambda: list(store.scan(key, within(5)))
    return calls


def expect_closed(rig: Rig, store: RemoteConnector, when: str) -> None:
    """Every method raises BackendClosed."""
    for op, call in each_operation(store, rig.key("closed")).items():
        try:
            answer = call()
        except BackendClosed:
            continue
        except Exception as error:
            raise Wrong(f"{op} {when} raised {error!r}, due is BackendClosed") from error
        raise Wrong(f"{op} {when} answered {answer!r}, due is BackendClosed")


@check("A1", fix="keep one frozen Capabilities; implement each protocol whose flag is set")
def claims_are_constant_and_implemented(rig: Rig) -> None:
    """Capabilities are constant after open, sane, and each claimed protocol is implemented."""
    first = rig.claims
    for flag, protocol in OPTIONAL_PROTOCOLS.items():
        claimed = getattr(first, flag)
        rig.expect(
            not claimed or isinstance(rig.store, protocol),
            f"{flag} is claimed without the methods of {protocol.__name__}",
        )
    rig.expect(first.max_concurrency >= 1, f"max_concurrency is {first.max_concurrency}")
    rig.expect(first.max_batch >= 1, f"max_batch is {first.max_batch}")
    alignment = first.alignment
    rig.expect(
        1 <= alignment <= 4096 and not alignment & (alignment - 1),
        f"alignment is {alignment}; it is a power of two up to 4096, what core pads to",
    )
    rig.expect(first.max_value_bytes >= 4096, f"max_value_bytes is {first.max_value_bytes}")
    rig.must_put({rig.key("k"): value(rig.seed, rig.size())})
    rig.expect(rig.store.capabilities == first, "capabilities changed after a put")
    rig.expect(rig.open().capabilities == first, "a second connector claims something else")


@check("A2", fix="return a BackendInfo whose schemes and options are what the backend understands")
def info_describes_the_backend(rig: Rig) -> None:
    """BackendInfo names the URL's scheme, versions that fit this core, and typed defaults."""
    scheme = rig.url.partition(":")[0]
    info = plugins.load(scheme, entry_points_of(rig.url, rig.harness.module)).info
    rig.expect(scheme in info.schemes, f"schemes {info.schemes} lack {scheme!r}")
    rig.expect(bool(info.name and info.version), "name and version are needed")
    rig.expect(tuple(info.api_min) <= API_VERSION, f"api_min {info.api_min} is above {API_VERSION}")
    rig.expect(tuple(info.api_tested) >= tuple(info.api_min), "api_tested is below api_min")
    for option in info.options:
        rig.expect(
            type(option.default) is option.type,
            f"option {option.name}: default {option.default!r} is no {option.type.__name__}",
        )
        rig.expect(bool(option.help), f"option {option.name} has no help")


@check(
    "A3", fix="check the URL in lmcache_open_connector; say in the hint what a right one looks like"
)
def bad_urls_are_refused(rig: Rig) -> None:
    """An unknown option, or a URL that can't work, is a ConfigError or BackendUnavailable at open,
    with a hint, and its probe says so."""
    mark = "&" if "?" in rig.url else "?"
    urls = [f"{rig.url}{mark}no_such_option=1"]
    if rig.harness.offers("bad_urls"):
        urls += rig.harness.bad_urls()
    points = entry_points_of(rig.url, rig.harness.module)
    for url in urls:
        try:
            rig.open(url)
        except (ConfigError, BackendUnavailable) as error:
            rig.expect(bool(error.hint), f"{url}: the error gives no hint: {error}")
        except Exception as error:
            raise Wrong(f"{url}: open raised {error!r}, due is ConfigError") from error
        else:
            raise Wrong(f"{url} was opened")
        backend = plugins.load(url.partition(":")[0], points)
        try:
            bare, options = split_options(url, backend.info.options, backend.info.name)
        except ConfigError:
            continue
        probe = backend.hook.lmcache_probe(url=bare, options=options)
        rig.expect(bool(probe.reason), f"{url}: the probe gives no reason")


@check("A4", fix="probe only looks: create, write, connect and start nothing that stays")
def probe_only_looks(rig: Rig) -> None:
    """A probe says whether the backend works here, within 2 s, and leaves nothing behind."""
    before = _tree(rig)
    if rig.harness.module:
        scheme_points = entry_points_of(rig.url, rig.harness.module)
        backend = plugins.load(rig.url.partition(":")[0], scheme_points)
        bare, options = split_options(rig.url, backend.info.options, backend.info.name)
        environment = dict(os.environ)
        probe = backend.hook.lmcache_probe(url=bare, options=options)
        rig.expect(dict(os.environ) == environment, "the probe wrote to the environment")
    else:
        probe = plugins.probe(rig.url)
    rig.expect(probe.usable, f"the probe says that a working store is not usable: {probe.reason}")
    rig.expect(bool(probe.reason), "the probe gives no reason")
    rig.expect(_tree(rig) == before, "the probe left files behind")


@check("A5", fix="import native libraries inside lmcache_open_connector, not in the plugin module")
def import_is_light(rig: Rig) -> None:
    """Importing the plugin and asking for its info loads no native library, starts no thread and
    leaves the environment alone."""
    scheme = rig.url.partition(":")[0]
    points = entry_points_of(rig.url, rig.harness.module)
    module = plugins.installed(points)[scheme].module
    # As this process was started: here the plugin may be imported already.
    lines = Path("/proc/self/environ").read_bytes().split(b"\0")
    environment = dict(
        line.decode("utf8", "surrogateescape").split("=", 1) for line in lines if line
    )
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, module],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    if done.returncode:
        raise Wrong(f"{module} can't be imported alone: {done.stderr.strip()[-300:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    rig.expect(not found["native"], f"{module} loads native modules: {found['native']}")
    rig.expect(not found["threads"], f"{module} starts {found['threads']} threads")
    rig.expect(not found["environment"], f"{module} changes {found['environment']}")


@check("A6", fix="compare os.getpid() with the one at open; BatchLoop.check_call does")
def forked_child_is_refused(rig: Rig) -> None:
    """A connector belongs to its process: in a forked child every method is BackendClosed, and the
    parent's goes on."""
    content = value(rig.seed, rig.size())
    rig.must_put({rig.key("k"): content})
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            expect_closed(rig, rig.store, "in a forked child")
        except BaseException as error:
            os.write(writer, str(error).encode()[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    rig.expect(not said, said)
    rig.expect_value(rig.key("k"), content, "in the parent, after a fork")


@check("A7", fix="keep state in the connector object, none in the module or the class")
def connectors_stand_side_by_side(rig: Rig) -> None:
    """Two connectors of one backend, and another backend beside them, do not disturb each other;
    one goes on when the other is closed."""
    first, second, other = rig.store, rig.open(), rig.open("memory://")
    size = rig.size()
    contents = [value(rig.seed + i, size) for i in range(3)]
    for number, (store, content) in enumerate(zip((first, second, other), contents)):
        rig.must_put({rig.key(f"of{number}"): content}, store)
    second.close()
    rig.expect_value(rig.key("of0"), contents[0], "after another connector was closed", first)
    rig.expect_value(rig.key("of2"), contents[2], "after another connector was closed", other)
    rig.must_put({rig.key("more"): contents[1]}, first)
    rig.expect_value(rig.key("more"), contents[1], "after another connector was closed", first)


@check("A8", fix="health() makes one cheap round trip, and says ok=False past its deadline")
def health_answers(rig: Rig) -> None:
    """A store that works is healthy; a deadline in the past makes health say no, or raise
    BackendUnavailable, at once."""
    health = rig.store.health(within(5))
    rig.expect(health.ok, f"health() says {health.reason!r} of a working store")
    if rig.claims.capacity_reported:
        rig.expect(health.used_bytes >= 0, "capacity_reported is claimed without used_bytes")
    rig.expect(
        health.total_bytes == -1 or health.total_bytes >= max(0, health.used_bytes),
        f"total_bytes is {health.total_bytes}: -1 is unbounded or unknown",
    )
    try:
        rig.store.health(within(-1))
    except BackendUnavailable:
        return


@check("A9", fix="make directories 0700 and files 0600: values are what users wrote")
def files_are_private(rig: Rig) -> None:
    """Files and directories that a backend makes are its user's alone."""
    rig.must_put({rig.key("k"): value(rig.seed, rig.size())})
    for folder, folders, files in os.walk(rig.harness.scratch):
        for name in (*folders, *files):
            mode = os.lstat(f"{folder}/{name}").st_mode & 0o777
            rig.expect(not mode & 0o077, f"{folder}/{name} has mode {mode:04o}")
    rig.store.delete([rig.key("k")], within(5))


def _tree(rig: Rig) -> set[str]:
    roots = (rig.harness.scratch, rig.scratch)
    return {
        os.path.join(folder, name)
        for root in roots
        for folder, folders, files in os.walk(root)
        for name in (*folders, *files)
    }
