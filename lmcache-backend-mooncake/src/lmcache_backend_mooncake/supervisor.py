"""`Supervisor`: keeps one helper process running, with core's regions mapped into it."""

from __future__ import annotations

import threading
import time

from lmcache_backend_mooncake.link import Late, Link
from lmcache_backend_mooncake.settings import Settings
from lmcache_core.sdk import BackendClosed, BackendUnavailable, HostServices, LMCacheError, Region

START_LIMIT_S = 10.0
_NEXT_START_S = 1.0
_MAP_LIMIT_S = 10.0


class Supervisor:
    """Starts a helper, and another one when that has died; thread-safe.

    Attributes:
        mapped: regions that the helper can reach, by id.
    """

    def __init__(self, settings: Settings, host: HostServices) -> None:
        self.mapped: dict[int, Region] = {}
        self._settings = settings
        self._logger = host.logger
        self._counter = host.counter
        self._regions: dict[int, Region] = {}
        self._link: Link | None = None
        self._lock = threading.Lock()
        self._map_lock = threading.Lock()
        self._starting: threading.Event | None = None
        self._error: LMCacheError | None = None
        self._next_start_s = 0.0
        self._closed = False

    def link(self, end_s: float) -> Link:
        """The helper that runs, or a new one.

        Raises:
            TimeoutError: none by ``end_s``; it goes on starting.
            BackendUnavailable, ConfigError: the last start failed, and the next one is not due.
        """
        with self._lock:
            if self._closed:
                raise _closed()
            if self._link is not None:
                if self._link.alive:
                    return self._link
                self._link.kill()
                self._link = None
                self.mapped = {}
                self._counter("mooncake.helper_deaths").inc()
            if self._starting is None:
                if self._error is not None and time.monotonic() < self._next_start_s:
                    raise self._error
                self._starting = threading.Event()
                threading.Thread(target=self._start, name="mooncake-start", daemon=True).start()
            started = self._starting
        if not started.wait(max(0.0, end_s - time.monotonic())):
            raise TimeoutError("the helper process is starting")
        with self._lock:
            link, error = self._link, self._error
        if link is not None:
            return link
        if error is not None:
            raise error
        raise (
            _closed()
            if self._closed
            else BackendUnavailable(
                "the helper process is gone", backend="mooncake", hint="the next call starts one"
            )
        )

    def add(self, region: Region) -> None:
        """Map ``region`` into this helper and every later one."""
        with self._map_lock:
            self._regions[region.region_id] = region
            with self._lock:
                link = self._link
            if link is not None and link.alive and not self._closed:
                self._map(link, region)

    def remove(self, region: Region) -> None:
        """Forget ``region``; a helper that does not is ended."""
        with self._map_lock:
            self._regions.pop(region.region_id, None)
            if self.mapped.pop(region.region_id, None) is None:
                return
            with self._lock:
                link = self._link
            if link is not None and link.alive:
                request = {"op": "unmap", "region": region.region_id}
                self._told(link, request, region, ())

    def close(self, limit_s: float) -> None:
        """End the helper, within ``limit_s`` seconds."""
        with self._lock:
            self._closed = True
            link = self._link
        if link is not None:
            link.close(lends=self._settings.segment_bytes > 0, limit_s=limit_s)

    def _start(self) -> None:
        link: Link | None = None
        error: LMCacheError | None = None
        try:
            link = Link(self._settings, time.monotonic() + START_LIMIT_S, self._logger.warning)
            self._counter("mooncake.helper_starts").inc()
        except LMCacheError as failed:
            error = failed
        except Exception as failed:  # such as no file descriptors: told to every caller
            error = BackendUnavailable(
                f"the helper process can't be started: {failed!r}",
                backend="mooncake", op="open", hint="see the error",
            )  # fmt: skip
        with self._map_lock:
            for region in list(self._regions.values()) if link is not None else ():
                assert link is not None
                self._map(link, region)
            with self._lock:
                self._link, self._error = link, error
                self._next_start_s = time.monotonic() + _NEXT_START_S
                started, self._starting = self._starting, None
                closed = self._closed
        if closed and link is not None:
            link.kill()
        if started is not None:
            started.set()

    def _map(self, link: Link, region: Region) -> None:
        if region.fd < 0:
            return
        request = {"op": "map", "region": region.region_id, "nbytes": region.nbytes}
        if self._told(link, request, region, (region.fd,)):
            self.mapped[region.region_id] = region

    def _told(
        self, link: Link, request: dict[str, object], region: Region, fds: tuple[int, ...]
    ) -> bool:
        try:
            codes = link.ask(request, time.monotonic() + _MAP_LIMIT_S, fds=fds)["codes"]
            failed = f"code {codes[0]}" if codes[0] else ""
        except (Late, OSError, BackendUnavailable) as error:
            failed = repr(error)
            if isinstance(error, Late) or request["op"] == "unmap":
                # What it can reach is not what we think: the next one knows.
                link.kill()
        if failed:
            # Its buffers are copied from now on.
            self._counter("mooncake.regions_failed").inc()
            self._logger.warning("region %d: %s: %s", region.region_id, request["op"], failed)
        return not failed


def _closed() -> BackendClosed:
    return BackendClosed("the connector was closed", backend="mooncake", hint="open it again")
