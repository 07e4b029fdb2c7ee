"""What the texts and losses of the pass key's training are: the options of the task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["LATE_WINDOWS", "RECIPE", "Options"]

RECIPE = Path(__file__).parent / "passkey.toml"
"""The settings that the shipped model is trained by."""

LATE_WINDOWS = 4
"""Most windows of a text that are trained on where `key_anywhere`, the key's included."""


@dataclass(frozen=True)
class Options:
    """Of the task."""

    windows: tuple[tuple[int, int], ...] = ((1, 1),)
    """Each text picks one: (chunks in a window, windows in a text at most). Where `key_anywhere`, the
    second number bounds the windows before the key's."""

    language_weight: float = 0.2
    """Weight of the loss of every token, beside that of the answers."""

    stay_weight: float = 0.2
    """Weight of the mean change of the global state over a window that the key is not in."""

    noise: float = 0.02
    """Standard deviation of what is added to the global state before a window, so that what is
    stored is an attractor."""

    hide_queue: float = 0.3
    """Share of windows whose question is asked with an empty queue, so that the global memory
    learns what the queue could tell."""

    key_anywhere: bool = False
    """Whether a text's key is as likely to come in any window as in the first. `LATE_WINDOWS` at
    most are trained on from there; those before are read without gradient. False: most keys come
    in the first window."""

    lead_windows: int = 0
    """Windows right before the key's that are trained on too, where `key_anywhere`: other numbers
    are no key."""

    spacings: tuple[float, ...] = (150.0, 400.0, 1500.0)
    """Mean bytes between two distractors: each text has one of these."""

    border_share: float = 0.0
    """Share of keys whose number is cut by a chunk's border, and of answers that are, beside those
    that chance cuts; where `key_anywhere`."""

    numbers: float = 0.0
    """Mean places in a chunk of prose that other numbers are written over, in any form: prose has
    tables, literals and dates, which are no key either."""

    first_gate_bias: float = 2.0
    """The gate starts mostly shut, so that what is stored stays while writing is learned."""

    weight_scale: float = 4.0
    """Projections and embeddings start at 0.02 times this: the usual 0.02 is for wide models."""
