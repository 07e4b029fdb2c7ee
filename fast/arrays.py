"""Arrays of any library: what states, files and checks ask of them.

PyTorch's tensors, NumPy's and CuPy's arrays, and those of any library that follows the Python array
API standard. None of the libraries but NumPy is imported here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import (
    array_namespace,
    device,
    is_cupy_array,
    is_numpy_array,
    is_torch_array,
)

__all__ = ["Array", "all_finite", "is_floating", "is_integer", "take_rows", "to_host"]

Array = Any
"""An array of any library."""


def to_host(x: Array) -> np.ndarray:
    """The same numbers as NumPy's, without a graph; bfloat16, which it has not, as float32."""
    if is_torch_array(x):
        x = x.detach().cpu()
        return (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()
    if is_cupy_array(x):
        return x.get()
    return np.asarray(x) if is_numpy_array(x) else np.from_dlpack(x)


def all_finite(x: Array) -> bool:
    """Whether no number is NaN or infinite."""
    xp = array_namespace(x)
    return bool(xp.all(xp.isfinite(x)))


def is_floating(x: Array) -> bool:
    """Whether the dtype is a real floating one, a half type included."""
    return array_namespace(x).isdtype(x.dtype, "real floating")


def is_integer(x: Array) -> bool:
    """Whether the dtype is an integer one; booleans are not."""
    return array_namespace(x).isdtype(x.dtype, "integral")


def take_rows(x: Array, index: np.ndarray) -> Array:
    """A copy of some rows of the first axis, [b, ...] -> [len(index), ...]."""
    xp = array_namespace(x)
    return xp.take(x, xp.asarray(index, device=device(x)), axis=0)
