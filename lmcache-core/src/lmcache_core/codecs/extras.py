"""What a codec needs beside core."""

from __future__ import annotations

from importlib.util import find_spec

from lmcache_core.sdk.errors import ConfigError


def require(module: str, codec: str) -> None:
    """Say what installs ``module``, without importing it: the codec has the extra of its name.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec(module) is None:
        raise ConfigError(
            f"codec {codec} needs {module}, which is not installed",
            backend=codec,
            op="open",
            hint=f"pip install 'lmcache-core[{codec}]'",
        )
