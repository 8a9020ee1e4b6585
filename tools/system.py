"""System packages: installed through apt as root, else named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PROGRAMS = {
    "gcc": "gcc", "make": "make", "redis-server": "redis-server",
    "chromium": "chromium", "chromedriver": "chromium-driver",
}  # fmt: skip
LIBRARIES = {"libnuma.so.1": "libnuma1", "libibverbs.so.1": "libibverbs1"}


def need(*programs: str, libraries: tuple[str, ...] = ()) -> None:
    """Have ``programs`` and ``libraries``, of the tables above, or exit with the fix."""
    missing = [PROGRAMS[program] for program in programs if shutil.which(program) is None]
    missing += [LIBRARIES[library] for library in libraries if not _found(library)]
    if not missing:
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"installing {', '.join(missing)}", flush=True)
        quiet = {"stdout": subprocess.DEVNULL}
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-q"], check=True, env=environment, **quiet)
        install = ["apt-get", "install", "-yq", *missing]
        subprocess.run(install, check=True, env=environment, **quiet)
        return
    sys.exit(f"error: missing {', '.join(missing)}\nhint: apt-get install {' '.join(missing)}")


def _found(library: str) -> bool:
    return any(next(Path("/usr").glob(f"{where}/{library}"), None) for where in ("lib*", "lib*/*"))
