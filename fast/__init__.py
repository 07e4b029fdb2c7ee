"""CoMeT in PyTorch: the equations of `reference`, batched, for real-size runs.

    from fast import CoMeTConfig, CoMeTModel

`CoMeTModel` reads endless text in linear time and constant memory; `CoMeTState` is where it
stands, a value to save, load and fork.
"""

from reference.config import BackboneConfig, CoMeTConfig, MemoryConfig

from .machine import keep_memory
from .model import IGNORE, CoMeTGeneration, CoMeTModel, CoMeTOutput
from .state import CoMeTState

__all__ = [
    "IGNORE",
    "BackboneConfig",
    "CoMeTConfig",
    "CoMeTGeneration",
    "CoMeTModel",
    "CoMeTOutput",
    "CoMeTState",
    "MemoryConfig",
    "keep_memory",
]
