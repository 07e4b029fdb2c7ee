"""A device that is not the CPU and needs no hardware: `pytest -p parity.pretend_device parity/
--device elsewhere`.

Its tensors say that they are on `elsewhere:0`, and compute with a tensor of the CPU inside. As on a
GPU, an operation on tensors of both devices raises, but for copies and for tensors of no dimension.
It is stricter in one thing: a GPU is indexed by tensors of the CPU too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("elsewhere")
HERE, THERE = torch.device("cpu"), torch.device("elsewhere", 0)

aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._copy_from.default)


class Elsewhere(Tensor):
    """A tensor on `elsewhere:0`, of the same shape and strides as the one inside."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> Elsewhere:
        self = Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=THERE,
        )
        self.inside = inside
        return self

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, *args, **(kwargs or {}))

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Elsewhere) -> None:  # as when a model's dtype is changed
        Tensor.data.__set__(self, new)
        self.inside = new.inside

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.inside.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inside.untyped_storage()


class Generator(torch.Generator):
    """A source of samples, which a tensor takes from its own device alone."""

    def __new__(cls, device: Any = HERE) -> Generator:
        self = super().__new__(cls)
        self.home = torch.device(device)
        return self


def run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """One operation, on what is inside its arguments."""
    known: dict[int, Tensor] = {}
    homes = set()

    def unwrap(x: Any) -> Any:
        if isinstance(x, Elsewhere):
            known[id(x.inside)] = x
            homes.add(THERE.type)
            return x.inside
        if isinstance(x, Tensor):
            known[id(x)] = x
            homes.update([HERE.type] * (x.dim() > 0))
        elif isinstance(x, Generator):
            homes.add(x.home.type)
        elif isinstance(x, torch.device):
            return HERE if x.type == THERE.type else x
        return [unwrap(y) for y in x] if isinstance(x, (list, tuple)) else x

    def wrap(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(map(wrap, x))
        if not isinstance(x, Tensor) or id(x) in known:
            return known.get(id(x), x)  # what is changed in place stays what it was
        return Elsewhere(x) if stays else x

    inside = [unwrap(x) for x in args], {name: unwrap(x) for name, x in kwargs.items()}
    if len(homes) > 1 and operation not in COPIES:
        raise RuntimeError(f"{operation}: arguments are on {THERE} and on {HERE}")
    device = kwargs.get("device")
    stays = THERE.type in homes if device is None else device.type == THERE.type
    return wrap(operation(*inside[0], **inside[1]))


FALLBACK, LIBRARY = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
FALLBACK.fallback(run, "PrivateUse1")


@torch.library.impl(LIBRARY, "_copy_from", "PrivateUse1")
def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    return run(aten.copy_.default, target, source)


torch.Generator = Generator  # type: ignore[misc]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out `torch.compile` and autocast: PyTorch has neither for tensors that compute in
    Python."""
    for item in items:
        if item.path.stem == "test_compile" or "autocast" in item.name:
            item.add_marker("host")
