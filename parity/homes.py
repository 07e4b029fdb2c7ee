"""Where the engine's laws run: array libraries and devices of theirs.

`array_api_strict` has nothing beyond the Python array API standard, and devices between which no
array moves unasked: what passes on its second device asks for nothing that only NumPy has, and
leaves nothing on the host. CuPy follows the same standard.
"""

import dataclasses
import importlib
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import array_api_compat.numpy as numpy_namespace
import array_api_strict
import numpy as np
from array_api_compat import is_numpy_array

from fast.arrays import dtype_of
from fast.cupy_engine import CoMeTEngine, operations
from reference.parameters import map_parameters

from .kernel_cases import emulated

array_api_strict.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False)


@dataclasses.dataclass(frozen=True)
class Home:
    """A library and a device of it, and whether it stands in for CuPy."""

    name: str
    xp: object
    device: object
    emulates: bool = False

    def array(self, x, dtype=None):
        x = np.asarray(x)
        kind = dtype_of(self.xp, dtype or str(x.dtype))
        return self.xp.asarray(x, dtype=kind, device=self.device)

    def tree(self, weights, dtype=None):
        return map_parameters(lambda _, x: self.array(x, dtype), weights)

    def engine(self, config, weights, dtype=None):
        return CoMeTEngine(config, self.tree(weights, dtype))

    @contextmanager
    def at_work(self):
        """What an engine of this home is called in: where it stands in for CuPy, the kernels run on
        NumPy's arrays, emulated, and `where` has CuPy's dtypes."""
        with ExitStack() as stack:
            if self.emulates:
                stack.enter_context(emulated())
                stack.enter_context(patch.object(operations, "is_cupy_array", is_numpy_array))
                stack.enter_context(patch.object(numpy_namespace, "where", where_of_cupy))
            yield


def where_of_cupy(condition, x, y):
    """CuPy 14 knows no bfloat16 in `where`, and makes float32 of it."""
    chosen = np.where(condition, x, y)
    return chosen.astype(np.float32) if str(chosen.dtype) == "bfloat16" else chosen


NUMPY = Home("numpy", numpy_namespace, None)
STRICT = Home("strict", array_api_strict, array_api_strict.Device("device1"))
NO_FLOAT64 = Home("no float64", array_api_strict, array_api_strict.Device("no_float64"))
KERNELS = Home("kernels", numpy_namespace, None, emulates=True)


def homes_of(metafunc):
    """Those that a test names in its mark `engine`, or with --engine cupy CuPy's."""
    if metafunc.config.getoption("engine") == "cupy":
        return [Home("cupy", importlib.import_module("array_api_compat.cupy"), 0)]
    return metafunc.definition.get_closest_marker("engine").args
