"""What `torch.compile` leaves alone. Of a call, the layers of a round are worth a graph
(`cells.run_layers`); around them are checks, plans and counts, in Python and NumPy on the host.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

__all__ = ["replace", "untraced"]

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
                # All at once: frames like this one are traced until then.
                torch.compiler.disable(_leave_out_all)()
            return (found[0] if found else function)(*args, **kwargs)

        def leave_out() -> None:
            found.append(torch.compiler.disable(function, recursive, reason=REASON))
            torch._dynamo.decorators.skip(call)

        # The compiler keeps its records, and counts, by a function's code: each its own.
        own = cast(Any, call)
        own.__code__ = own.__code__.replace(co_name=function.__name__)
        _WAITING.append(leave_out)
        return own

    return decorate


_WAITING: list[Callable[[], None]] = []
"""What is to be done once the compiler is loaded."""


def _leave_out_all() -> None:
    for one in _WAITING:
        one()
    _WAITING.clear()


replace = untraced()(dataclasses.replace)
"""`dataclasses.replace`, of what holds counts and tensors: tracing it gains nothing, and the compiler
fails at NumPy's counts in inference mode.
"""
