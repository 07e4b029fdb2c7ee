"""Training: settings, the loop, its checkpoints and metrics. What is trained on is in `fast.tasks`."""

from .settings import Phase, Settings, read_settings
from .trainer import Processes, Task, Trainer, build_model

__all__ = ["Phase", "Processes", "Settings", "Task", "Trainer", "build_model", "read_settings"]
