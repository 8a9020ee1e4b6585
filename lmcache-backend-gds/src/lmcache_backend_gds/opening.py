"""From options to a `GdsConnector`: which mover, and what it can claim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmcache_backend_gds import driver
from lmcache_backend_gds.connector import GdsConnector, capabilities
from lmcache_backend_gds.direct import DirectOps
from lmcache_backend_gds.movers import KvikioMover, PosixMover
from lmcache_backend_gds.regions import Regions
from lmcache_core.sdk import ConfigError, FileOps, HostServices, ValueFiles

_CLAIMED = ("durability", "direct")


def open_connector(root: str, options: Mapping[str, Any], host: HostServices) -> GdsConnector:
    """The connector that the option ``io`` asks for.

    Raises:
        ConfigError: the directory can't be used, or ``io=kvikio`` can't be had.
    """
    if options["io"] != "posix":
        try:
            kvikio, device = _usable_kvikio(auto=options["io"] == "auto")
        except _Lacking as lacking:
            if options["io"] == "kvikio":
                raise ConfigError(
                    f"io=kvikio: {lacking}", backend="gds", op="open", hint=lacking.hint
                ) from lacking
            host.logger.info("values go by plain system calls: %s; %s", lacking, driver.ADDS)
        else:
            return _open_kvikio(kvikio, root, options, host, device=device)
    return _open_posix(root, options, host)


class _Lacking(Exception):
    """Why kvikio is not what moves bytes here, and the fix."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


def _usable_kvikio(*, auto: bool) -> tuple[Any, bool]:
    """kvikio's module, and whether the driver has a device; with ``auto`` it must have one.

    Raises:
        _Lacking: it can't run here.
    """
    found = driver.look()
    if found.lacking:
        raise _Lacking(found.lacking, found.hint)
    device = driver.has_device()
    if auto and not device:
        raise _Lacking("the driver has no device", "io=kvikio takes it for host memory alone")
    try:
        import kvikio
        import kvikio.cufile_driver
        import kvikio.defaults
    except (ImportError, OSError) as error:
        raise _Lacking(f"kvikio can't be imported: {error}", driver.INSTALL) from error
    return kvikio, device


def _open_posix(root: str, options: Mapping[str, Any], host: HostServices) -> GdsConnector:
    files = _files(root, options, DirectOps() if options["direct"] else None)
    claims = {name: options[name] for name in _CLAIMED}
    return GdsConnector(
        files,
        PosixMover(files),
        io="posix",
        capabilities=capabilities(**claims, io="posix", device=False, gds=False),
        queue_depth=options["queue_depth"],
        released=host.released,
        max_stuck=options["max_stuck"],
        clock=host.clock,
    )


def _open_kvikio(
    kvikio: Any, root: str, options: Mapping[str, Any], host: HostServices, *, device: bool
) -> GdsConnector:
    """kvikio's settings belong to the process: its pool gets more threads where ``queue_depth``
    asks for more than it has, never fewer; ``direct`` switches O_DIRECT on, nothing off."""
    files = _files(root, options, None)
    if kvikio.defaults.get("num_threads") < options["queue_depth"]:
        kvikio.defaults.set("num_threads", options["queue_depth"])
    if options["direct"]:
        kvikio.defaults.set({"auto_direct_io_read": True, "auto_direct_io_write": True})
    gds = device and _has_gds(kvikio, host)
    failed = host.counter("gds_regions_failed")
    regions = Regions(kvikio.memory_register, kvikio.memory_deregister, failed) if gds else None
    claims = {name: options[name] for name in _CLAIMED}
    connector = GdsConnector(
        files,
        KvikioMover(files, kvikio.CuFile, task_size_bytes=options["task_size_bytes"]),
        io="kvikio, GDS" if gds else "kvikio",
        capabilities=capabilities(**claims, io="kvikio", device=device, gds=gds),
        queue_depth=options["queue_depth"],
        regions=regions,
        released=host.released,
        max_stuck=options["max_stuck"],
        clock=host.clock,
    )
    if regions is not None:
        for region in host.regions():
            regions.add(region)
        host.on_region_added(connector.register_region)
        host.on_region_removed(connector.unregister_region)
    return connector


def _has_gds(kvikio: Any, host: HostServices) -> bool:
    """Whether cuFile moves bytes between disk and device without the host's memory."""
    if kvikio.defaults.is_compat_mode_preferred():
        return False
    try:
        return bool(kvikio.cufile_driver.get("is_gds_available"))
    except RuntimeError as error:
        host.logger.warning("cuFile does not say whether GDS is available: %s", error)
        return False


def _files(root: str, options: Mapping[str, Any], ops: FileOps | None) -> ValueFiles:
    return ValueFiles(root, backend="gds", sync=options["durability"] == "host", ops=ops)
