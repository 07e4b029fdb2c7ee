"""What a run has told: a table, and a picture of its curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..drawing import COLOURS, save_figure, style

__all__ = ["draw", "table"]

Metrics = Sequence[dict[str, float]]
"""Of each step, as `Trainer.read_metrics` gives them."""

SMOOTHED = 50
"""Parts of a run whose means make a curve."""


def table(metrics: Metrics, rows: int = 10) -> str:
    """A Markdown table of means over equal parts of a run's steps.

    Args:
        metrics: of every step.
        rows: parts, at most.
    """
    names = _names(metrics)
    lines = ["| steps | " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("|" + " ---: |" * (1 + len(names)))
    for part in np.array_split(np.arange(len(metrics)), min(rows, len(metrics))):
        steps = [metrics[i] for i in part]
        cells = [_mean(steps, name) for name in names]
        told = ["" if np.isnan(x) else f"{x:.4g}" for x in cells]
        where = f"{steps[0]['step']:,} to {steps[-1]['step']:,}"
        lines.append(f"| {where} | {' | '.join(told)} |")
    return "\n".join(lines)


def _names(metrics: Metrics) -> list[str]:
    return [
        name for name in dict.fromkeys(key for told in metrics for key in told) if name != "step"
    ]


def _mean(steps: Metrics, name: str) -> float:
    found = [told[name] for told in steps if name in told]
    return float(np.mean(found)) if found else float("nan")


def draw(metrics: Metrics, path: Path) -> Path:
    """A picture of every curve but the seconds', each a mean over a fiftieth of the run.

    Args:
        metrics: of every step.
        path: of the picture, PNG or SVG.
    """
    names = [name for name in _names(metrics) if name != "seconds"]
    parts = np.array_split(np.arange(len(metrics)), min(SMOOTHED, len(metrics)))
    with style(path.stem) as plt:
        figure, axes = plt.subplots(
            len(names), figsize=(6.4, 1.7 * len(names)), sharex=True, squeeze=False
        )
        for name, axis in zip(names, axes[:, 0], strict=True):
            points = [
                (metrics[part[-1]]["step"], mean)
                for part in parts
                if not np.isnan(mean := _mean([metrics[i] for i in part], name))
            ]
            axis.plot(*zip(*points, strict=True), color=COLOURS["global memory"])
            axis.set_title(name.replace("_", " "))
        axes[-1, 0].set_xlabel("step")
        figure.tight_layout()
        return save_figure(figure, path)
