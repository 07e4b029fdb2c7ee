"""CoMeT in NumPy, one equation a function: the specification that `fast` is checked against.

Read in this order: `layers`, `temporary_memory`, `global_memory`, `stream`, `model`; then, as you
need them, `config`, `parameters` and `chunking`. There is no batch axis and nothing clever.
"""

from .config import BackboneConfig, CoMeTConfig, MemoryConfig

__all__ = ["BackboneConfig", "CoMeTConfig", "MemoryConfig"]
