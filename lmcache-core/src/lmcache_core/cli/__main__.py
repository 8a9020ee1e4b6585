"""``python -m lmcache_core.cli``: the command ``lmc``."""

from lmcache_core.cli import main

main()
