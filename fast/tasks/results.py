"""Results of an evaluation as a file: what was found, by which setting, on which machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoints import read_json
from ..files import atomic_write

__all__ = ["load_results", "save_results"]

Result = TypeVar("Result")
Setting = TypeVar("Setting")


def save_results(path: Path, machine: str, setting: Any, results: Sequence[Any]) -> None:
    """Write JSON, whole or not at all.

    Args:
        path: an existing file is replaced.
        machine: what it was measured on.
        setting, results: dataclasses of numbers, strings, and lists of them.
    """
    data = {
        "machine": machine,
        "setting": asdict(setting),
        "results": [asdict(result) for result in results],
    }
    atomic_write(path, json.dumps(data, indent=1) + "\n")


def load_results(
    path: Path, result: type[Result], setting: type[Setting]
) -> tuple[list[Result], Setting]:
    """Results and their setting, as `save_results` wrote them.

    Args:
        path: of the file.
        result, setting: their dataclasses; lists of a setting are made tuples.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or holds something else.
    """
    data = read_json(path)
    try:
        given = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in data["setting"].items()
        }
        return [result(**found) for found in data["results"]], setting(**given)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold results ({error}); measure again.") from error
