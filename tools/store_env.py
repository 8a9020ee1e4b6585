"""Makes build/stores/NAME: one backend's real library, and the wheels of this repository.

    python3.11 tools/store_env.py mooncake

Standard library only.  The wheels are built and installed anew each time; the rest only after a
change of this file, of the constraints or of the package's metadata.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from system import need

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
CONSTRAINTS = ["-c", str(ROOT / "constraints.txt")]
TOOLS = ("pytest", "hypothesis", "prometheus-client")


@dataclass(frozen=True)
class Store:
    """What a backend's tests, judge, benchmark and demo need.

    Attributes:
        package: its directory; "" for what core brings itself.
        extras: of the package.
        alone: requirements that are installed without theirs, which are large and not needed.
        programs, libraries: of the system, see `need`.
    """

    package: str = ""
    extras: tuple[str, ...] = ("test",)
    alone: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Directories whose wheels it is made of."""
        return ("lmcache-core", "conformance", *([self.package] if self.package else []))


STORES = {
    "core": Store(),
    "redis": Store("lmcache-backend-redis", programs=("redis-server",)),
    "mooncake": Store("lmcache-backend-mooncake", ("cpu", "test"),
                      libraries=("libibverbs.so.1",)),
    "infinistore": Store(
        "lmcache-backend-infinistore",
        ("client", "test"),
        programs=("gcc",),
        libraries=("libibverbs.so.1",),
    ),
    "gds": Store(
        "lmcache-backend-gds",
        alone=("kvikio-cu13==26.10.0", "libkvikio-cu13==26.10.0", "nvidia-cufile",
               "rapids-logger", "packaging", "numpy", "cuda-pathfinder"),
        programs=("gcc",),
    ),
    "nixl": Store("lmcache-backend-nixl", alone=("nixl-cu12==1.5.1", "numpy")),
}  # fmt: skip


def install(name: str) -> Path:
    """The environment's Python, with wheels of the sources as they are now."""
    store = STORES[name]
    need(*store.programs, libraries=store.libraries)
    home = BUILD / "stores" / name
    python = home / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-qq"]
    fresh = not python.exists() or _read(home / "installed") != _stamp(store)
    if fresh:
        print(f"environment of {name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    wheels = _wheels(pip, home / "wheels", store)
    if fresh:
        extras = ",".join(store.extras)
        local = [str(wheel) for wheel in wheels]
        if store.package:
            local[-1] += f"[{extras}]"
        subprocess.run([*pip, "install", *CONSTRAINTS, *local, *TOOLS], check=True)
        if store.alone:
            subprocess.run([*pip, "install", "--no-deps", *store.alone], check=True)
        (home / "installed").write_text(_stamp(store))
    else:
        again = ["install", "--no-deps", "--force-reinstall", *map(str, wheels)]
        subprocess.run([*pip, *again], check=True)
    return python


def _wheels(pip: list[str], out: Path, store: Store) -> list[Path]:
    shutil.rmtree(out, ignore_errors=True)
    found = []
    for source in store.sources:
        subprocess.run([*pip, "wheel", "--no-deps", "-w", str(out), f"./{source}"],
                       check=True, cwd=ROOT)  # fmt: skip
        found.append(next(path for path in out.glob("*.whl") if path not in found))
    return found


def _stamp(store: Store) -> str:
    parts = [Path(__file__), ROOT / "constraints.txt"]
    parts += [ROOT / source / "pyproject.toml" for source in store.sources]
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    print(install(sys.argv[1]))
