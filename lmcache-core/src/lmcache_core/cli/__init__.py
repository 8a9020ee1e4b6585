"""The command ``lmc``."""

from __future__ import annotations


def main() -> None:
    """Entry point of the console script."""
    from lmcache_core.cli.app import app

    app()
