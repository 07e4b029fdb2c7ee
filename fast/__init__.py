"""CoMeT for real-size runs: the equations of `reference`, batched.

    from fast import CoMeTConfig, CoMeTModel

`CoMeTModel` reads endless text in linear time and constant memory; `CoMeTState` is where it
stands, a value to save, load and fork. `fast.cupy_engine` says the same on CuPy, or any array.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    from reference.config import BackboneConfig, CoMeTConfig, MemoryConfig
except ImportError as error:
    import sys
    from pathlib import Path

    other = getattr(sys.modules.get("reference"), "__file__", None)
    if other is None or Path(other).parent == Path(__file__).parent.with_name("reference"):
        raise
    if Path(other).name == "__init__.py":
        other = Path(other).parent
    raise ImportError(
        f"{other} was imported in place of CoMeT's own package `reference`; rename it, or start "
        "Python from another folder."
    ) from error

if TYPE_CHECKING:
    from .inputs import IGNORE
    from .machine import keep_memory
    from .model import CoMeTGeneration, CoMeTModel, CoMeTOutput, CoMeTWindow
    from .recorder import Recorder
    from .state import CoMeTState

__all__ = [
    "IGNORE",
    "BackboneConfig",
    "CoMeTConfig",
    "CoMeTGeneration",
    "CoMeTModel",
    "CoMeTOutput",
    "CoMeTState",
    "CoMeTWindow",
    "MemoryConfig",
    "Recorder",
    "keep_memory",
]

_HOMES = {
    "IGNORE": "inputs",
    "CoMeTGeneration": "model",
    "CoMeTModel": "model",
    "CoMeTOutput": "model",
    "CoMeTState": "state",
    "CoMeTWindow": "model",
    "Recorder": "recorder",
    "keep_memory": "machine",
}
"""Where a name lives, imported when it is asked for: the engine on arrays runs without PyTorch."""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
