"""What `torch.compile` leaves alone. Of a call, the layers of a round are worth a graph
(`cells.run_layers`); around them are checks, plans and counts, in Python and NumPy on the host.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

__all__ = ["untraced"]

F = TypeVar("F", bound=Callable[..., Any])

REASON = (
    "this plans on the host, between the layers' graphs: compile without fullgraph=True, or compile "
    "fast.cells.run_layers alone"
)


def untraced(*, recursive: bool = True) -> Callable[[F], F]:
    """Decorate a function that the compiler does not trace: `torch.compiler.disable`, without its
    import of the compiler, which takes seconds, in a process that compiles nothing.

    Args:
        recursive: whether what it calls is not traced either.
    """

    def decorate(function: F) -> F:
        found: list[Any] = []

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not found and "torch._dynamo" in sys.modules:
                found.append(torch.compiler.disable(function, recursive, reason=REASON))
            return (found[0] if found else function)(*args, **kwargs)

        # The compiler keeps its records, and counts, by a function's code: each its own.
        own = cast(Any, call)
        own.__code__ = own.__code__.replace(co_name=function.__name__)
        return own

    return decorate
