"""Training: settings, the loop, its checkpoints and metrics. What is trained on is in `fast.tasks`."""

from .settings import Phase, Settings, fit, put, read_settings
from .trainer import Processes, Task, Trainer, build_model

__all__ = [
    "Phase",
    "Processes",
    "Settings",
    "Task",
    "Trainer",
    "build_model",
    "fit",
    "put",
    "read_settings",
]
