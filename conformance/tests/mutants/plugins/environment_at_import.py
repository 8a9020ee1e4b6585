"""The plugin module sets a variable for its library."""

import os

from mutants.plugins.good import *  # noqa: F403

KILLS = "A5"
os.environ["MUTANT_THREADS"] = "1"
