"""The tasks of the harness, by their names on the command line."""

from __future__ import annotations

from typing import Any

from . import synthetic
from .events import Events
from .scrolls import Scrolls
from .traces import Traces

__all__ = ["EVALUATIONS"]

EVALUATIONS: dict[str, Any] = synthetic.TASKS | {
    "events": Events,
    "scrolls": Scrolls,
    "traces": Traces,
}
"""Classes of `samples.Evaluation`."""
