"""Arrays of any library: what states, files and checks ask of them.

PyTorch's tensors, NumPy's and CuPy's arrays, and those of any library that follows the Python array
API standard. None of the libraries but NumPy is imported here. NumPy and CuPy have bfloat16 through
the package ml_dtypes.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import (
    array_namespace,
    device,
    is_array_api_obj,
    is_cupy_array,
    is_numpy_array,
    is_torch_array,
)

__all__ = [
    "FLOATS",
    "HALF_TYPES",
    "Array",
    "all_finite",
    "dtype_name",
    "dtype_of",
    "is_floating",
    "is_integer",
    "numbers",
    "shown",
    "take_rows",
    "to_host",
]

Array = Any
"""An array of any library."""

HALF_TYPES = ("float16", "bfloat16")
"""Floating dtypes narrower than float32, by name."""

FLOATS = ("float64", "float32", *HALF_TYPES)
"""Dtypes that models compute in, by name."""


def dtype_name(x: Array) -> str:
    """The dtype's bare name, such as "float32", in any library."""
    return str(x.dtype).rpartition(".")[2]


def dtype_of(xp: Any, name: str) -> Any:
    """A library's dtype of a bare name.

    Args:
        xp: the library's namespace.
        name: such as "float32".
    """
    if name == "bfloat16" and not hasattr(xp, name):
        return np.dtype(ml_dtypes.bfloat16)
    return getattr(xp, name)


def to_host(x: Array) -> np.ndarray:
    """The same numbers as NumPy's, without a graph, in the same dtype."""
    if is_torch_array(x):
        x = x.detach().cpu()
        if dtype_name(x) == "bfloat16":  # PyTorch converts it to NumPy's as no more than its bits
            return x.view(array_namespace(x).int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()
    if is_cupy_array(x):
        return x.get()
    return np.asarray(x) if is_numpy_array(x) else np.from_dlpack(x)


def all_finite(x: Array) -> bool:
    """Whether no number is NaN or infinite."""
    xp = array_namespace(x)
    if 0 in x.shape:
        return True
    with np.errstate(invalid="ignore"):  # NaN is the maximum and the minimum; these need no memory
        return bool(xp.isfinite(xp.max(x)) & xp.isfinite(xp.min(x)))


def is_floating(x: Array) -> bool:
    """Whether the dtype is one of `FLOATS`."""
    return dtype_name(x) in FLOATS


def is_integer(x: Array) -> bool:
    """Whether the dtype is an integer one; booleans are not."""
    return "int" in dtype_name(x)


def numbers(value: Any) -> np.ndarray:
    """What a user gave as a list or an array, as NumPy's; of no numbers where it is neither."""
    try:
        return to_host(value) if is_array_api_obj(value) else np.asarray(value)
    except Exception:  # each library has its own for what is ragged, sparse or nowhere
        return np.array(None)


def shown(value: Any, most: int = 80) -> str:
    """A value in a message: on one line, cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a number of thousands of digits has no text
        return f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


def take_rows(x: Array, index: np.ndarray) -> Array:
    """A copy of some rows of the first axis, [b, ...] -> [len(index), ...]."""
    xp = array_namespace(x)
    return xp.take(x, xp.asarray(index, device=device(x)), axis=0)
