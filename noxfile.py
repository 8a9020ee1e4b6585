"""Sessions of `make test`, and the benchmarks.  `nox -l` lists them."""

from __future__ import annotations

import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))

nox.options.sessions = ["lint", "types", "imports", "unit"]
nox.options.default_venv_backend = "venv"
PYTHON = "3.11"
PACKAGES = ("lmcache-core", "conformance", "lmcache-backend-redis")


def install_local(session: nox.Session, *tools: str) -> None:
    local = [arg for package in PACKAGES for arg in ("-e", str(ROOT / package))]
    session.install("-q", *local, *tools, "-c", str(ROOT / "constraints.txt"))


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """ruff: rules and format."""
    session.install("-q", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python=PYTHON)
def types(session: nox.Session) -> None:
    """mypy --strict on every src."""
    install_local(session, "mypy", "types-PyYAML", "prometheus-client")
    session.run("mypy", *(f"{package}/src" for package in PACKAGES))


@nox.session(python=PYTHON)
def imports(session: nox.Session) -> None:
    """import-linter: imports go down."""
    install_local(session, "import-linter")
    session.run("lint-imports", "--config", "pyproject.toml")


@nox.session(python=PYTHON)
def unit(session: nox.Session) -> None:
    """Unit, property, simulation, crash and conformance tests; no engine."""
    install_local(session, "pytest", "hypothesis", "prometheus-client")
    session.run("pytest", "--ignore=lmcache-core/tests/vllm", *session.posargs)


@nox.session(python=PYTHON)
def wheels(session: nox.Session) -> None:
    """Each package as a wheel, installed alone."""
    session.install("-q", "build")
    out = session.create_tmp()
    for package in PACKAGES:
        session.run("python", "-m", "build", "-q", "--wheel", "--outdir", out, package, silent=True)
    names = {package: package.replace("-", "_") for package in PACKAGES}
    names["conformance"] = "lmcache_conformance"
    found = {package: next(Path(out).glob(f"{name}-*.whl")) for package, name in names.items()}
    session.run("pip", "install", "-q", "--force-reinstall", str(found["lmcache-core"]))
    session.run("python", "-c", "import lmcache_core.sdk, sys; assert 'numpy' not in sys.modules")
    session.run("lmc", "backends")
    for package in PACKAGES[1:]:
        session.run("pip", "install", "-q", "--find-links", out, str(found[package]))
    session.run("python", "-c", "import lmcache_conformance")
    session.run("lmc", "backends")


def vllm_python(session: nox.Session) -> str:
    from vllm_env import install

    return str(install())


@nox.session(python=False)
def vllm(session: nox.Session) -> None:
    """The connector on real vLLM."""
    python = vllm_python(session)
    session.run(
        python,
        "-m",
        "pytest",
        "lmcache-core/tests/vllm",
        "-W",
        "ignore",
        *session.posargs,
        external=True,
    )


@nox.session(python=False)
def demo(session: nox.Session) -> None:
    """`make demo TINY=1`, with the disk and with Redis below host."""
    session.run("make", "demo", "TINY=1", external=True)
    session.run("make", "demo", "TINY=1", "BACKEND=redis", external=True)


@nox.session(python=False)
def bench(session: nox.Session) -> None:
    """Every figure beside its raw limit; writes build/bench.json."""
    python = vllm_python(session)
    out = ["--out", "build/bench.json"]
    env = {"OMP_NUM_THREADS": "1"}
    session.run(python, "benchmarks/core.py", *out, env=env, external=True)
    session.run(python, "benchmarks/stores.py", *out, env=env, external=True)
    for tiny in ((), ("--tiny",)):
        session.run("python3.11", "tools/demo.py", "--model-only", *tiny, external=True)
    tiny_model = "build/models/tiny-llama"
    session.run(python, "benchmarks/stall.py", "--model", tiny_model, *out, env=env, external=True)
    model = "build/models/SmolLM2-135M-Instruct"
    session.run(python, "benchmarks/ttft.py", "--model", model, *out, env=env, external=True)
