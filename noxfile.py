"""Sessions of `make test`, and the benchmarks.  `nox -l` lists them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))

nox.options.sessions = ["lint", "types", "imports", "unit"]
nox.options.default_venv_backend = "venv"
PYTHON = "3.11"
PACKAGES = (
    "lmcache-core", "conformance", "lmcache-backend-redis", "lmcache-backend-mooncake",
    "lmcache-backend-infinistore", "lmcache-backend-gds", "lmcache-backend-nixl",
)  # fmt: skip
TESTED_HERE = PACKAGES[:3]
"""The others' tests need their real library: session `stores`."""
PROXY = ("starlette", "uvicorn", "httpx")
"""The extra ``proxy`` of core."""
STORES = ["redis", "mooncake", "infinistore", "gds", "nixl"]


def install_local(
    session: nox.Session, *tools: str, packages: tuple[str, ...] = TESTED_HERE
) -> None:
    local = [arg for package in packages for arg in ("-e", str(ROOT / package))]
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
    tools = ("mypy", "types-PyYAML", "prometheus-client", "opentelemetry-api", "redis", *PROXY)
    install_local(session, *tools, packages=PACKAGES)
    session.run("mypy", *(f"{package}/src" for package in PACKAGES))
    session.run("mypy", *(f"{source}/src" for source, _, _ in STRANGERS))


@nox.session(python=PYTHON)
def imports(session: nox.Session) -> None:
    """import-linter: imports go down."""
    install_local(session, "import-linter", packages=PACKAGES)
    session.run("lint-imports", "--config", "pyproject.toml")


@nox.session(python=PYTHON)
def docs(session: nox.Session) -> None:
    """The documentation as a site, with dead links as errors.  Writes build/site."""
    session.install("-q", "mkdocs<2", "mkdocs-material", "mkdocstrings[python]", "ruff")
    # mkdocs is pinned below 2, which is what its theme warns of.
    session.run("mkdocs", "build", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(python=PYTHON)
def unit(session: nox.Session) -> None:
    """Unit, property, simulation, crash and conformance tests; no engine."""
    extras = ("prometheus-client", "numba", "zstandard", "opentelemetry-sdk", *PROXY)
    install_local(session, "pytest", "hypothesis", "schemathesis", *extras)
    ignored = [f"--ignore=lmcache-core/tests/{part}" for part in ("vllm", "web", "e2e")]
    session.run("pytest", *ignored, "-m", "not conformance", *session.posargs)


@nox.session(python=PYTHON)
def web(session: nox.Session) -> None:
    """The controller's page in headless Chromium.  Writes build/screenshots."""
    from system import need

    need("chromium", "chromedriver")
    install_local(session, "pytest", "hypothesis", "selenium", "prometheus-client", *PROXY)
    session.run("pytest", "lmcache-core/tests/web", *session.posargs)


def build_wheels(session: nox.Session, *sources: str) -> dict[str, Path]:
    """A wheel of each source directory, in a directory of the session's own."""
    session.install("-q", "build")
    out = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(out, ignore_errors=True)
    found = {}
    for source in sources:
        into = out / source.replace("/", "_")
        session.run("python", "-m", "build", "-q", "-w", "-o", str(into), source, silent=True)
        found[source] = next(into.glob("*.whl"))
    return found


@nox.session(python=PYTHON)
def wheels(session: nox.Session) -> None:
    """Each package as a wheel, installed alone."""
    found = build_wheels(session, *PACKAGES)
    session.run("pip", "install", "-q", "--force-reinstall", str(found["lmcache-core"]))
    session.run("python", "-c", "import lmcache_core.sdk, sys; assert 'numpy' not in sys.modules")
    session.run("lmc", "backends")
    for package in PACKAGES[1:]:
        session.run("pip", "install", "-q", str(found[package]))
    session.run("python", "-c", "import lmcache_conformance")
    session.run("lmc", "backends")


JUDGED = {
    "memory": ("core", ("core", "resilient")),
    "file": ("core", ("core", "resilient", "durable")),
    "file-synced": ("core", ("core", "resilient", "durable")),
    "redis": ("redis", ("core", "resilient", "durable")),
    "redis-unix": ("redis", ("core",)),
    "redis-cluster": ("redis", ("core", "durable")),
    "redis-sentinel": ("redis", ("core", "durable")),
    "mooncake": ("mooncake", ("core", "resilient", "durable", "direct")),
    "infinistore": ("infinistore", ("core", "resilient", "durable", "direct")),
    "gds": ("gds", ("core", "resilient", "durable", "direct")),
    "gds-direct": ("gds", ("core", "resilient", "durable", "direct")),
    "gds-kvikio": ("gds", ("core", "resilient", "durable")),
    "nixl": ("nixl", ("core", "resilient", "durable", "direct")),
    "nixl-obj": ("nixl", ("core", "durable", "direct")),
}
"""Backend -> the environment of tools/store_env.py, and the profiles that it must pass."""
CHANNELS = {"memory": "tcp", "nixl": "nixl+ucx"}
"""Backend -> the channel that is judged in the same environment."""


@nox.session(python=False)
@nox.parametrize("backend", list(JUDGED))
def conformance(session: nox.Session, backend: str) -> None:
    """Judge a backend from its wheel, and its channel; `-- --full` for the long plan.  Writes
    build/certificates."""
    from store_env import install

    store, profiles = JUDGED[backend]
    programs = install(store).parent
    judge(session, backend, *profiles, programs=programs)
    if backend in CHANNELS:
        scheme = CHANNELS[backend]
        out = ROOT / "build" / "certificates" / f"channel-{scheme}.json"
        run = (str(programs / "lmcache-conformance"), "channel", scheme, "--out", str(out))
        session.run(*run, *(() if "--full" in session.posargs else ("--quick",)), external=True)


@nox.session(python=PYTHON)
def codecs(session: nox.Session) -> None:
    """Judge the codecs of core.  Writes build/certificates."""
    install_local(session, "pytest", "numba", "zstandard")
    for name in ("zstd", "cachegen"):
        report = str(ROOT / "build" / "certificates")
        session.run("lmcache-conformance", "codec", name, "--report", report, *session.posargs)


@nox.session(python=False)
@nox.parametrize("store", STORES[1:])
def stores(session: nox.Session, store: str) -> None:
    """A package's own tests, from its wheel, on the real library."""
    from store_env import install

    python = str(install(store))
    tests = f"lmcache-backend-{store}/tests"
    options = ("-m", "not conformance", "-p", "no:cacheprovider", *session.posargs)
    session.run(python, "-m", "pytest", tests, *options, external=True)


def judge(session: nox.Session, backend: str, *profiles: str, programs: Path) -> None:
    """Run the suite that lies in ``programs``, and verify the certificate."""
    program, report = str(programs / "lmcache-conformance"), ROOT / "build" / "certificates"
    required = [word for profile in profiles for word in ("--require", profile)]
    run = (program, "run", backend, "--report", str(report), *required)
    session.run(*run, *session.posargs, external=True)
    session.run(program, "verify", str(report / f"{backend}.json"), external=True)


@nox.session(python=PYTHON)
def third_party(session: nox.Session) -> None:
    """Two backends of strangers, and a new one from the scaffold: all from wheels."""
    new = Path(session.create_tmp()) / "new"
    shutil.rmtree(new, ignore_errors=True)
    found = build_wheels(session, "lmcache-core", "conformance", *(f for f, _, _ in STRANGERS))
    ours = [str(found["lmcache-core"]), str(found["conformance"])]
    session.run("pip", "install", "-q", "--force-reinstall", "--no-deps", *ours)
    session.install("-q", *ours)
    session.run("lmcache-conformance", "new", "mystore", str(new))
    session.install("-q", str(new))
    judge(session, "mystore", "core", programs=Path(session.bin))
    for source, backend, profiles in STRANGERS:
        session.install("-q", "--force-reinstall", "--no-deps", str(found[source]))
        judge(session, backend, *profiles, programs=Path(session.bin))
        session.run("pip", "uninstall", "-q", "-y", f"lmcache-backend-{backend}")


STRANGERS = (
    ("examples/third_party_backend", "sqlite", ("core",)),
    ("examples/third_party_native", "shelf", ("core", "resilient", "direct")),
)


@nox.session(python=PYTHON)
def mutants(session: nox.Session) -> None:
    """The suite judges itself: every wrong backend is found by the check that is meant for it, and
    most of 200 mechanical mutants (10 minutes; `-- --wrong-only` leaves those out)."""
    install_local(session, "pytest", "hypothesis")
    env = {"PYTHONPATH": str(ROOT / "conformance" / "tests")}
    session.run("python", "-m", "mutants.run", env=env)
    if "--wrong-only" not in session.posargs:
        session.run("python", "-m", "mutants.mechanical", *session.posargs, env=env)


@nox.session(python=PYTHON)
def api(session: nox.Session) -> None:
    """The contract's public names against the committed snapshot; `-- --write` renews it."""
    session.install("-q", "griffe>=1.7")
    session.run("python", "tools/api_snapshot.py", *session.posargs)


def vllm_python(session: nox.Session) -> str:
    from vllm_env import install

    return str(install())


@nox.session(python=False)
def vllm(session: nox.Session) -> None:
    """The connector on real vLLM; NIXL for transfers between engines."""
    python = vllm_python(session)
    from vllm_env import install_store

    install_store("nixl")
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
def soak(session: nox.Session) -> None:
    """Two engines on a node server under random prompts and restarts, 2 minutes;
    `-- --minutes 30` for long.  Writes build/soak.json."""
    script = "lmcache-core/tests/soak/soak.py"
    session.run(vllm_python(session), script, *session.posargs, external=True)


@nox.session(python=False)
def controller_e2e(session: nox.Session) -> None:
    """Every operation of the controller on two engines and a node server, with both kinds of state;
    then each process is killed.  Writes build/controller.json."""
    python = vllm_python(session)
    session.run("python3.11", "tools/demo.py", "--model-only", external=True)
    script = ("lmcache-core/tests/e2e/controller_e2e.py", "--out", "build/controller.json")
    model = ("--model", "build/models/SmolLM2-135M-Instruct")
    session.run(python, *script, *model, *session.posargs, external=True)


@nox.session(python=False)
def gpu(session: nox.Session) -> None:
    """Page copies on a CUDA device; elsewhere on the fake one, and what did not run is named.

    GPU_PYTHON: an interpreter with CUDA torch, vLLM, lmcache-core, pytest and hypothesis.
    """
    python = os.environ.get("GPU_PYTHON") or vllm_python(session)
    unit = "lmcache-core/tests/unit"
    tests = ("lmcache-core/tests/gpu", f"{unit}/test_device.py", f"{unit}/test_device_teeth.py")
    session.run(python, "-m", "pytest", *tests, *session.posargs, external=True)


@nox.session(python=False)
def demo(session: nox.Session) -> None:
    """`make demo TINY=1`, with the disk and with each store below host; and `make demo PD=1`."""
    session.run("make", "demo", "PD=1", external=True)
    session.run("make", "demo", "TINY=1", external=True)
    for store in STORES:
        session.run("make", "demo", "TINY=1", f"BACKEND={store}", external=True)


@nox.session(python=False)
def bench(session: nox.Session) -> None:
    """Every figure beside its raw limit; writes build/bench.json."""
    python = vllm_python(session)
    out = ["--out", "build/bench.json"]
    env = {"OMP_NUM_THREADS": "1"}
    session.run(python, "benchmarks/core.py", *out, env=env, external=True)
    session.run(python, "benchmarks/node.py", *out, env=env, external=True)
    session.run(python, "benchmarks/steps.py", *out, env=env, external=True)
    session.run(python, "benchmarks/stores.py", *out, env=env, external=True)
    session.run(python, "benchmarks/codecs.py", *out, env=env, external=True)
    session.run(python, "benchmarks/controller.py", *out, env=env, external=True)
    from store_env import install

    for store in STORES[1:]:
        figures = (str(install(store)), f"benchmarks/backend_{store}.py", *out)
        session.run(*figures, env=env, external=True)
    nixl = str(install("nixl"))
    session.run(nixl, "benchmarks/channel_nixl.py", *out, env=env, external=True,
                success_codes=[0, -11])  # fmt: skip
    session.run(python, "benchmarks/channel_tcp.py", *out, env=env, external=True)
    for tiny in ((), ("--tiny",)):
        session.run("python3.11", "tools/demo.py", "--model-only", *tiny, external=True)
    tiny_model = "build/models/tiny-llama"
    session.run(python, "benchmarks/stall.py", "--model", tiny_model, *out, env=env, external=True)
    model = "build/models/SmolLM2-135M-Instruct"
    for name in ("ttft", "link", "pd"):
        figures = (python, f"benchmarks/{name}.py", "--model", model, *out)
        session.run(*figures, env=env, external=True)


@nox.session(python=False)
def codec_report(session: nox.Session) -> None:
    """What each codec and level costs SmolLM2 (5 minutes on one core); `-- --windows 4` for
    short.  Writes build/codecs.json and build/codecs.png."""
    python = vllm_python(session)
    session.run("python3.11", "tools/demo.py", "--model-only", external=True)
    report = ("-m", "lmcache_core.cli", "codec", "report", "build/models/SmolLM2-135M-Instruct")
    options = ("--out", "build", "--windows", "24", *session.posargs)
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    session.run(python, *report, *options, env=env, external=True)
