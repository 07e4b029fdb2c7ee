"""What the pass key's model is, and how it is trained: sizes, phases, stages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from reference.config import BackboneConfig, CoMeTConfig, MemoryConfig

__all__ = ["LATE_WINDOWS", "LONG", "PHASES", "STAGES", "Phase", "Recipe", "small_config"]


def small_config() -> CoMeTConfig:
    """The shipped model: 200,451 parameters, 0.8 MB in float32."""
    return CoMeTConfig(
        BackboneConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
        ),
        MemoryConfig(
            chunk_size=128,
            global_memory_size=8,
            temporary_memory_size=16,
            compression_stride=8,
            gate_bias=True,
            gate_saturation=0.95,
        ),
    )


@dataclass(frozen=True)
class Phase:
    """A stretch of training."""

    steps: int
    """Windows to train on."""

    windows: tuple[tuple[int, int], ...]
    """Each text picks one: (chunks in a window, windows in a text at most)."""

    learning_rate: float
    """Of AdamW, at the phase's start."""

    decay: int = 0
    """Steps over which it falls linearly, to a fiftieth at most; 0: it stays."""

    language_weight: float = 0.2
    """Weight of the loss of every token, beside that of the answers."""

    stay_weight: float = 0.2
    """Weight of the mean change of the global state over a window that the key is not in."""

    noise: float = 0.02
    """Standard deviation of what is added to the global state before a window, so that what is
    stored is an attractor."""

    def share_at(self, step: int) -> float:
        """The share of the learning rate that is left at a step of the phase."""
        return max(1 - step / self.decay, 0.02) if self.decay else 1.0


SHORT = ((1, 1), (1, 3), (2, 3), (1, 10))
LONG = (*SHORT, (2, 8), (4, 7))
"""Windows of up to 2 chunks, and of up to 4; texts of up to 10 chunks, and of up to 28."""

PHASES = (
    Phase(2500, ((1, 1),), 2e-3),
    Phase(1500, LONG, 3e-3),
    Phase(5000, LONG, 3e-3, decay=5000, language_weight=0.05, noise=0.03),
    Phase(4500, SHORT, 2e-3, decay=4500, language_weight=0.05, noise=0.03),
)
"""Find the key one chunk back; carry it; settle; read more keys, in shorter texts."""

SPREAD = ((1, 1), (1, 1), (1, 4), (2, 3), (1, 10), (2, 8), (1, 27))
AGED = ((1, 1), (1, 4), (2, 3), (1, 10), (2, 8), (1, 26), (2, 12))
"""Windows of the later stages: the second number bounds where the key comes, see `Recipe.key_anywhere`."""


@dataclass(frozen=True)
class Recipe:
    """What a run does: the same recipe and seed give the same weights on the same machine."""

    phases: tuple[Phase, ...] = PHASES
    """One after the other."""

    batch_size: int = 32
    """Texts read side by side."""

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

    seed: int = 0
    """Of weights and texts."""

    def phase_at(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, and the step within it."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        return self.phases[-1], self.phases[-1].steps

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)


LATE_WINDOWS = 4
"""Most windows of a `key_anywhere` recipe's text that are trained on, the key's included."""

AMONG_SENTENCES = Recipe(
    phases=(Phase(7000, AGED, 1.2e-3, decay=7000, language_weight=0.05, noise=0.03),),
    key_anywhere=True,
    lead_windows=1,
    border_share=0.4,
    spacings=(25.0, 100.0, 400.0, 1500.0),
)
"""The third stage, see `STAGES`."""

STAGES = (
    Recipe(),
    Recipe(
        phases=(Phase(8019, SPREAD, 2e-3, decay=16000, language_weight=0.05, noise=0.03),),
        key_anywhere=True,
        border_share=0.4,
    ),
    AMONG_SENTENCES,
    dataclasses.replace(
        AMONG_SENTENCES,
        phases=(Phase(4500, AGED, 1e-3, decay=4500, language_weight=0.05, noise=0.03),),
        numbers=0.3,
    ),
)
"""One run after the other, each from the model of the one before: learn to find keys at all; then
those that come late, and those that borders cut; then those after many other sentences with
numbers; then those after numbers of any form."""
