"""One run of the suite over one harness, without any test runner."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from lmcache_conformance import certificate, waivers
from lmcache_conformance.checks import CHECKS
from lmcache_conformance.frame import Check, Outcome, Result, plan, run_check
from lmcache_conformance.harness import Harness
from lmcache_conformance.rig import Rig, entry_points_of
from lmcache_core import plugins
from lmcache_core.sdk import Capabilities, ConfigError

GROUP = "lmcache.conformance"


class Judge:
    """Judges the backend of a harness, check by check; not thread-safe.

    Args:
        harness: started when the first check runs, stopped by `close`.
        full: the long plan.
        waived: of `waivers.load`.
        seed: of everything random; None draws one.

    Attributes:
        results: so far, in order.
    """

    def __init__(
        self,
        harness: Harness,
        *,
        full: bool = False,
        waived: Mapping[str, waivers.Waiver] | None = None,
        seed: int | None = None,
    ) -> None:
        self.harness = harness
        self.full = full
        self.seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
        self.plan: list[Check] = plan(CHECKS, full=full)
        self.results: list[Result] = []
        self._waived = dict(waived or {})
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._capabilities: Capabilities | None = None

    def run(self, check: Check) -> Result:
        """The answer to one check.

        Raises:
            Exception: the harness can't be started; whatever it raised.
        """
        scratch = self._started() / check.id
        scratch.mkdir(exist_ok=True)
        rig = Rig(self.harness, scratch=scratch, full=self.full, seed=self.seed)
        if self._capabilities is None:
            self._capabilities = self._claims(rig)
        result = waivers.apply(run_check(check, rig), self._waived)
        self.results.append(result)
        return result

    def certificate(self) -> certificate.Certificate:
        """Of the whole run.

        Raises:
            ConfigError: not every planned check has answered.
        """
        harness = self.harness
        return certificate.make(
            backend=name_of(harness),
            full=self.full,
            plan=self.plan,
            results=self.results,
            capabilities=self._capabilities,
            distribution=_distribution(harness),
            server=harness.server_version(),
        )

    def close(self) -> None:
        """Stop the harness, remove its files."""
        if self._folder is not None:
            self.harness.stop()
            self._folder.cleanup()
            self._folder = None

    def _started(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lmc-", ignore_cleanup_errors=True)
            (Path(self._folder.name) / "store").mkdir()
            self.harness.start(Path(self._folder.name) / "store")
        return Path(self._folder.name)

    def _claims(self, rig: Rig) -> Capabilities | None:
        try:
            opened = rig.open()
        except Exception:  # each check that opens it will say so
            return None
        found = opened.capabilities
        opened.close()
        return found if isinstance(found, Capabilities) else None


@contextmanager
def judging(harness: Harness, **options: object) -> Iterator[Judge]:
    """A `Judge` that is closed at the end."""
    judge = Judge(harness, **options)  # type: ignore[arg-type]
    try:
        yield judge
    finally:
        judge.close()


def name_of(harness: Harness) -> str:
    """What the certificate calls the backend."""
    return harness.name or harness.url().partition(":")[0]


def harnesses() -> dict[str, metadata.EntryPoint]:
    """Installed harnesses by the backend's short name; loads none."""
    return {entry.name: entry for entry in metadata.entry_points(group=GROUP)}


class UrlHarness(Harness):
    """A backend without a harness of its own, at a URL that somebody keeps running."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self._url = url

    def url(self) -> str:
        return self._url


def find(name: str, url: str = "") -> Harness:
    """The harness of ``name``; with ``url`` the store at that place.

    Raises:
        ConfigError: neither a harness nor a URL.
    """
    if url:
        return UrlHarness(name, url)
    found = harnesses()
    if name not in found:
        raise ConfigError(
            f"no harness is called {name!r}",
            hint=f"installed are {', '.join(sorted(found)) or 'none'}; add an entry point to "
            f'[project.entry-points."{GROUP}"], or give --url',
        )
    try:
        made = found[name].load()()
    except Exception as error:
        raise ConfigError(
            f"the harness {found[name].value} can't be made: {error!r}",
            hint=f'the entry point of group "{GROUP}" names a class without arguments',
        ) from error
    if not isinstance(made, Harness):
        raise ConfigError(
            f"{found[name].value} is a {type(made).__name__}", hint="subclass Harness"
        )
    return made


def failed(results: Sequence[Result]) -> list[Result]:
    """Those that fail the run."""
    return [each for each in results if each.outcome is Outcome.FAIL]


def _distribution(harness: Harness) -> str:
    try:
        points = entry_points_of(harness.url(), harness.module)
        ref = plugins.installed(points)[harness.url().partition(":")[0]]
    except (ConfigError, KeyError):
        return ""
    return "" if ref.distribution == "unknown" else ref.distribution
