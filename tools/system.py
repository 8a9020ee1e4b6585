"""System packages: installed through apt as root, else named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

PROGRAMS = {"gcc": "gcc", "make": "make", "redis-server": "redis-server"}


def need(*programs: str | None, packages: tuple[str, ...] = ()) -> None:
    """Have ``programs`` (names of `PROGRAMS`) and ``packages``, or exit and say the fix."""
    missing = [PROGRAMS[p] for p in programs if p is not None and shutil.which(p) is None]
    missing += packages
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
