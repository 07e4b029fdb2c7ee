"""CoMeT on CuPy, NumPy, or any array of the Python array API standard: inference without importing PyTorch.

    from fast.cupy_engine import CoMeTEngine

The twins of `reference` a third time, batched like those of `fast`, under the same names. Rounds are
planned and laid out by `fast.chunking` and `fast.rows`, states are `fast.CoMeTState`, files are
`fast.checkpoints`: what one path saved, the other loads.
"""

from .engine import CoMeTEngine

__all__ = ["CoMeTEngine"]
