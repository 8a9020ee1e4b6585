"""Lends memory to a store until it is ended: run one on each host that has some to spare.

    python -m lmcache_backend_mooncake.segment --master HOST:PORT --bytes 64GiB [--protocol rdma]

Values then survive the engines.  Prints one line when the memory is lent.  SIGTERM takes it back.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from lmcache_backend_mooncake.helper import facing
from lmcache_backend_mooncake.library import hint_of

_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def main() -> int:
    """Lend; see the module."""
    parser = argparse.ArgumentParser(
        prog="lmcache_backend_mooncake.segment", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--master", required=True, help="host:port of mooncake_master")
    parser.add_argument("--bytes", required=True, type=_bytes, help="such as 64GiB")
    parser.add_argument("--local-hostname", default="", help="address of this host for the others")
    parser.add_argument("--metadata-server", default="P2PHANDSHAKE")
    parser.add_argument("--protocol", default="tcp", choices=("tcp", "rdma"))
    parser.add_argument("--rdma-devices", default="", help="separated by commas")
    parser.add_argument("--ssd-path", default="", help="directory for what overflows")
    given = parser.parse_args()
    # Before there is another thread, which would take the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        print(f"error: {error}; try: {hint_of(str(error))}", file=sys.stderr)
        return 1
    if given.ssd_path:
        os.makedirs(given.ssd_path, mode=0o700, exist_ok=True)
    host, _, port = given.master.rpartition(":")
    store = MooncakeDistributedStore()
    code = store.setup(
        local_hostname=given.local_hostname or facing(host, int(port)),
        metadata_server=given.metadata_server,
        global_segment_size=given.bytes,
        local_buffer_size=0,
        protocol=given.protocol,
        rdma_devices=given.rdma_devices,
        master_server_addr=given.master,
        enable_ssd_offload=bool(given.ssd_path),
        ssd_offload_path=given.ssd_path,
    )
    if code:
        print(f"error: Mooncake's setup answered {code}; does the master run?", file=sys.stderr)
        return 1
    print(f"lends {given.bytes} bytes as {store.get_hostname()}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    store.close()
    return 0


def _bytes(text: str) -> int:
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
