"""Which form of an operation runs: one dictionary.

An operation with a fused kernel has two forms of one name and one meaning: the kernel's, in
`kernels/`, and that of arrays, which runs everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from array_api_compat import is_cupy_array

from ..arrays import Array, dtype_name
from . import kernels

__all__ = ["KERNELS", "has_kernels", "operation"]

KERNELS: dict[str, Callable[..., Any]] = {
    name: getattr(kernels, name)
    for name in ("attention", "rms_norm", "rotate", "silu_product", "update_global")
}
"""The kernels' form of every operation that has one. Take a name out, and its array form runs."""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def has_kernels(x: Array) -> bool:
    """Whether kernels run on an array: one of CuPy, of a dtype that they store, so not float64."""
    return is_cupy_array(x) and dtype_name(x) in kernels.TYPES


def operation(array_form: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a function's kernel run in its place where its arrays have one."""

    @functools.wraps(array_form)
    def either(*args: Parameters.args, **options: Parameters.kwargs) -> Result:
        on_gpu = any(map(has_kernels, (*args, *options.values())))
        form = KERNELS.get(array_form.__name__, array_form) if on_gpu else array_form
        return form(*args, **options)

    return either
