"""The step that workers share: what they agree on before it, and what they add up after it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

from reference.parameters import map_parameters, named_parameters

from ..inputs import (
    IGNORE,
    check_call,
    check_choice,
    check_chunk_sizes,
    check_count,
    check_kind,
    check_labels,
)
from ..layers import Weights, widen
from ..model import CoMeTModel, shift_labels
from ..state import fingerprint
from .ring import Ring
from .schedule import plan_chunks
from .step import Span, Step, Text, digest

__all__ = ["Pipeline"]


class Pipeline:
    """A model whose training steps on long texts are shared among the workers of a mesh.

        mesh = init_pipeline_mesh(pipeline=4)
        pipeline = Pipeline(model, mesh)
        loss = pipeline.step(ids, labels=ids)
        optimizer.step()

    Every process holds a model of the same weights, and is given the same text. A step leaves the
    gradients in every process that `model(ids, labels=ids).loss.backward()` leaves in one, so that
    equal optimizers keep the weights equal. Over the mesh's dimension "data", each group of workers
    has texts of its own, and loss and gradients are those of all of them as one batch.

    A model that `torch.distributed.fsdp.fully_shard` has cut over "data" keeps its weights,
    gradients and optimizer state cut between steps. During a step all weights are there.
    """

    def __init__(
        self,
        model: CoMeTModel,
        mesh: DeviceMesh,
        *,
        block: int = 1,
        recompute: str = "none",
        timeout: float = 600.0,
    ) -> None:
        """All processes of the mesh make theirs, at the same time.

        Args:
            model: of the same config and weights in every process.
            mesh: with a dimension "pipeline", and "data" where there is one, as
                `init_pipeline_mesh` makes it.
            block: consecutive chunks that a worker reads before the next worker's turn. 1 starts
                all workers soonest; more means fewer messages.
            recompute: "cells" computes a cell's inside again in the backward pass, so that no more
                than its inputs and outputs is kept; "none" keeps all.
            timeout: seconds that a worker waits for a message of another. It has to be longer than
                a whole step, since the first worker waits at its end for gradients from all others.

        Raises:
            ValueError: an argument does not fit.
            WorkerLostError: another process was lost meanwhile.
        """
        check_kind("model", model, CoMeTModel, "a CoMeTModel")
        check_choice("recompute", recompute, ("none", "cells"))
        self.model, self.mesh = model, mesh
        self.block, self.recompute = check_count("block", block, 1), recompute
        self._ring = _ring_of(mesh, timeout)
        if model.device.type != mesh.device_type:
            raise ValueError(
                f"model is on {model.device}, the mesh is of {mesh.device_type}; make it by "
                f"init_pipeline_mesh(..., device={model.device.type!r}), or move the model."
            )
        self.spans: list[Span] | None = None
        """What this worker did, one after another; a list that is put here is added to."""

    def step(
        self,
        ids: Tensor,
        labels: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        chunk_sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """Forward and backward: gradients are added to those in every parameter's `.grad`.

        Args:
            ids, labels, lengths, chunk_sizes: as in a call of the model, from the text's start; the
                same in all workers of a text.

        Returns:
            The loss, a scalar without a graph, the same in every process: mean over the labels of
            all texts. nan if all are IGNORE.

        Raises:
            ValueError: an argument does not fit, or workers were given different texts, models or
                options; every worker raises it, and can go on.
            WorkerLostError: another process was lost, or did not answer within `timeout`.
        """
        return self._run(ids, labels, lengths, chunk_sizes, train=True)

    def evaluate(
        self,
        ids: Tensor,
        labels: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        chunk_sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """The loss alone, shared among the workers as in `step`."""
        return self._run(ids, labels, lengths, chunk_sizes, train=False)

    def _run(self, ids: Any, labels: Any, lengths: Any, chunk_sizes: Any, *, train: bool) -> Tensor:
        text = self._agree(ids, labels, lengths, chunk_sizes, train)
        params, sharded = self._weights()
        step = Step(
            self._ring,
            text,
            params,
            self.model.config,
            block=self.block,
            recompute=self.recompute == "cells",
            train=train,
            receive=self.receive,
            spans=self.spans,
        )
        if not train:
            with torch.no_grad():
                nats = self._add_up(step.run(), [], [])
        else:
            with self._own_gradients(), torch.enable_grad():
                nats = step.run()
                owners = sources = list(self.model.parameters())
                if sharded:
                    named = named_parameters(self.model.weights.to_dict())
                    leaves = named_parameters(params)
                    owners, sources = list(named.values()), [leaves[name] for name in named]
                nats = self._add_up(nats, owners, sources)
        return (nats / text.num_labels).to(widen(self._norm()).dtype)

    @contextmanager
    def _own_gradients(self) -> Iterator[None]:
        """Gradients of this step alone inside, added to those from before at its end."""
        owners = list(self.model.parameters())
        before = [p.grad for p in owners]
        for p in owners:
            p.grad = None
        try:
            yield
        except BaseException:
            for p, gradient in zip(owners, before, strict=True):
                p.grad = gradient
            raise
        for p, gradient in zip(owners, before, strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else gradient.add_(p.grad)

    def _norm(self) -> Tensor:
        return self.model.weights["norm"]

    def _agree(self, ids: Any, labels: Any, lengths: Any, chunk_sizes: Any, train: bool) -> Text:
        """The text, checked here and compared with what all other processes were given.

        It costs one pass over ids, labels and weights, and one message of 40 bytes to each.
        """
        try:
            text = self._check(ids, labels, lengths, chunk_sizes)
        except ValueError:
            self._ring.gather([1, 0, 0, 0, 0])  # or the others would wait
            raise
        own = [0, self._digest(train), text.digest(), sum_of_bits(self.model), text.num_labels]
        found = self._ring.gather(own).numpy()  # [data, pipeline, 5]
        refused, models, texts, weights, num_labels = np.moveaxis(found, -1, 0)
        if refused.any():
            worker = int(refused.any(axis=0).argmax())
            raise ValueError(f"worker {worker} refused its arguments; its own error says why.")
        replica = weights[:, :1] if self._is_sharded() else weights[0, 0]
        for what, differs in (
            ("model's config, trained parameters or dtype, or another block or recompute",
             models != models[0, 0]),
            ("text, labels, lengths or chunk_sizes", texts != texts[:, :1]),
            ("model: its weights", weights != replica),
        ):  # fmt: skip
            if differs.any():
                raise ValueError(
                    f"workers were given another {what}; all workers of a text need the same."
                )
        return dataclasses.replace(text, num_labels=int(num_labels[:, 0].sum()))

    def _digest(self, train: bool) -> int:
        """Of what all workers have alike, but for the weights and the text."""
        trained = [(name, p.requires_grad) for name, p in self.model.named_parameters()]
        how = (self.block, self.recompute, train, self._norm().dtype)
        return digest(f"{fingerprint(self.model.config)} {how} {trained}".encode())

    def _is_sharded(self) -> bool:
        return any(isinstance(p, DTensor) for p in self.model.parameters())

    def _check(self, ids: Any, labels: Any, lengths: Any, chunk_sizes: Any) -> Text:
        """What `step` takes, checked."""
        ids, sizes, _ = check_call(self.model, ids, lengths, None, None)
        if chunk_sizes is not None:
            chunk_sizes = check_chunk_sizes(chunk_sizes, sizes, ids.shape[1])
        check_kind("labels", labels, Tensor, "a tensor like ids, such as ids itself")
        labels = check_labels(labels, ids, sizes, self.model.config.backbone.vocab_size)
        targets = F.pad(shift_labels(labels, sizes), (0, 1), value=IGNORE)
        chunks = plan_chunks(self.model.config, sizes, ids.shape[1], chunk_sizes)
        return Text(F.pad(ids, (0, 1)), targets, chunks, int((targets != IGNORE).sum()))

    def _weights(self) -> tuple[Weights, bool]:
        """The weights to compute with, and whether they were put together from shards: then they
        are leaves of their own, in a nested dict.
        """
        if not self._is_sharded():
            return self.model.weights, False

        def whole(_: str, p: Tensor) -> Tensor:
            full = p.full_tensor() if isinstance(p, DTensor) else p
            return full.detach().requires_grad_(p.requires_grad)

        with self._ring.watch(None, "shards of"):
            return map_parameters(whole, self.model.weights.to_dict()), True

    def _add_up(self, nats: Tensor, owners: Sequence[Any], sources: Sequence[Tensor]) -> Tensor:
        """Gradients, summed over the workers and the data, in every parameter's `.grad`.

        Args:
            nats: of this worker's chunks.
            owners: the parameters; none, and there are no gradients.
            sources: what holds their gradients now: they themselves, or the whole weights that
                were put together from their shards.

        Returns:
            The nats of all.
        """
        start = time.perf_counter()
        # A parameter that no chunk of any worker uses has no gradient, as in one process.
        used = [p.grad is not None for p in sources]
        sums = torch.tensor([float(nats), *map(float, used)], dtype=torch.float64)
        sums = sums.to(nats.device)
        self._ring.add([sums])
        all_used = sums[1:].tolist()
        whole: list[Any] = []
        shards: list[Any] = []
        for owner, source, uses in zip(owners, sources, all_used, strict=True):
            if not uses:
                continue
            if source.grad is None:
                source.grad = torch.zeros_like(source)
            if source is not owner:
                with self._ring.watch(None, "a sum with"):
                    _hand_over(owner, source)
            gradient = owner.grad
            if isinstance(gradient, DTensor):
                shards.append(gradient.to_local())
            else:
                whole.append(gradient)
        self._ring.add(whole)
        self._ring.add(shards, data=False)  # over the data, a shard is summed already
        if self.spans is not None:
            end = time.perf_counter()
            self.spans.append(Span("add", self._ring.worker, -1, -1, start, end))
        return sums[0]

    def receive(self, kind: str, messages: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
        """Begin to receive a block's messages, one a layer; each is waited for on its own."""
        return [self._ring.receive(kind, message) for message in messages]


def _hand_over(owner: Any, source: Tensor) -> None:
    """Give a parameter the gradient of the whole weight that was made of it: a shard gets its part,
    summed over the data.
    """
    owner.grad, source.grad = source.grad, None
    if isinstance(owner, DTensor):
        mesh = owner.device_mesh
        sums = DTensor.from_local(owner.grad, mesh, [Partial()] * mesh.ndim, run_check=False)
        owner.grad = sums.redistribute(mesh, owner.placements)


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By their bytes."""


def sum_of_bits(model: nn.Module) -> int:
    """A sum over the bits of all weights in this process, as integers: in whatever order it is
    taken, equal weights have the same.
    """
    total = 0
    for number, p in enumerate(model.parameters()):
        x = p.detach()
        bits = (
            (x.to_local() if isinstance(x, DTensor) else x)
            .contiguous()
            .view(INTEGERS[p.element_size()])
        )
        total += (2 * number + 1) * int(bits.sum(dtype=torch.int64))
    return total % 2**63


_RINGS: dict[Any, tuple[Any, Ring]] = {}
"""By what a mesh is, with the process group of all that it belongs to."""


def _ring_of(mesh: DeviceMesh, timeout: float) -> Ring:
    """The ring of a mesh, made once, since wires are sockets and threads; then kept, since processes
    have to agree on when one is made.
    """
    check_kind("mesh", mesh, DeviceMesh, "a DeviceMesh, such as init_pipeline_mesh makes")
    ranks = mesh.mesh
    key = tuple(ranks.flatten().tolist()), tuple(ranks.shape), mesh.mesh_dim_names, timeout
    world, ring = _RINGS.get(key, (None, None))
    if ring is None or world is not dist.group.WORLD:
        ring = Ring(mesh, timeout)
        _RINGS[key] = dist.group.WORLD, ring
    return ring
