"""The project's logger; the application decides what becomes of it."""

from __future__ import annotations

import logging

logger = logging.getLogger("lmcache_core")
