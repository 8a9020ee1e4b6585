"""What a codec costs a model: measured on a real one, through the code that tiers use.

Needs the extra ``report`` (torch, transformers, matplotlib); nothing of it is imported before a
report is asked for.
"""

from __future__ import annotations

from lmcache_core.quality.plan import Choice, Plan, choices
from lmcache_core.quality.report import LayerErrors, Report, Row, make_report, steps_of

__all__ = [
    "Choice",
    "LayerErrors",
    "Plan",
    "Report",
    "Row",
    "choices",
    "make_report",
    "steps_of",
]
