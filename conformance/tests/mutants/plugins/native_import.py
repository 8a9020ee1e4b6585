"""The plugin module imports a native library."""

import msgspec  # noqa: F401

from mutants.plugins.good import *  # noqa: F403

KILLS = "A5"
