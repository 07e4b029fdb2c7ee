"""Many chunks at once, along diagonals: layer i of chunk t beside layer i + 1 of chunk t - 1.

Of a chunk, a layer needs the layer below it, and its own memories after the chunk before. So the cells
(layer, chunk) whose numbers have one sum do not need each other, and are computed as **one** cell: the
layers take the place of a batch, each with its own weights. A product of three layers is one call in
place of three, which is worth much where products are small, and nothing where they fill a processor.

    step      0       1       2       3
    layer 0   chunk 0 chunk 1 chunk 2
    layer 1           chunk 0 chunk 1 chunk 2
    layer 2                   chunk 0 chunk 1

`params`, `config` and the letters of shapes are as in `stream`; l are layers that are computed together.

Source: diagonal batching (arXiv 2506.05229), of recurrent memory tokens there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from reference.config import CoMeTConfig

from .cells import Layout, Rotation, Tensors, embed, run_layer
from .compiling import untraced
from .layers import Weights, take_slots
from .rows import Row

__all__ = ["Stacked", "read_diagonals", "stack_layers"]

Stacked = dict[str, Any]
"""The weights of all layers by the names that one layer's have, nested likewise: [layers, ...]."""

# Layers that run together change in number from step to step: each would be a graph of its own.
_run_layer = untraced()(run_layer)


class StackedLinear:
    """Linear maps of several layers, side by side; called as a module is, and faster.

    Args:
        weight: [l, o, i].
        bias: [l, o] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.turned = weight.mT
        self.bias = None if bias is None else bias[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """[l * b, n, i] -> [l * b, n, o], each b of them by their layer's map."""
        rows = x.reshape(len(self.turned), -1, x.shape[-1])
        if self.bias is None:
            product = torch.bmm(rows, self.turned)
        else:
            product = torch.baddbmm(self.bias, rows, self.turned)
        return product.view(*x.shape[:-1], -1)


@untraced()
def stack_layers(layers: Weights) -> Stacked:
    """The weights of all layers, copied side by side; gradients flow back to each.

    Args:
        layers: of a model's weights.

    Raises:
        ValueError: something has taken the place of a map, or hooks watch a module: neither would be
            called.
    """
    for name, module in layers.named_modules():
        hooks = (
            *(module._forward_hooks, module._forward_pre_hooks),
            *(module._backward_hooks, module._backward_pre_hooks),
        )
        if any(hooks):
            raise ValueError(
                f"layers.{name} has hooks, which diagonals do not call; remove them, or read without "
                "diagonal=True."
            )
    return _stack([layer.to_dict(f"layers.{i}.") for i, layer in enumerate(layers)])


def _stack(trees: Sequence[dict[str, Any]]) -> Stacked:
    """Nested dicts of tensors alike, as one of tensors [l, ...]."""
    return {
        name: _stack([tree[name] for tree in trees])
        if isinstance(value, dict)
        else torch.stack([tree[name] for tree in trees])
        for name, value in trees[0].items()
    }


def _choose(stacked: Stacked, first: int, last: int, b: int) -> dict[str, Any]:
    """The weights of layers first to last - 1, as `cells.run_layer` takes one layer's for a batch of
    l * b sequences.
    """
    found: dict[str, Any] = {}
    for name, value in stacked.items():
        if isinstance(value, dict):
            found[name] = _choose(value, first, last, b)
            continue
        own = value[first:last]
        if own.dim() == 3:
            stem = name.removesuffix("_proj")
            bias = stacked.get(f"{stem}_bias")
            found[name] = StackedLinear(own, None if bias is None else bias[first:last])
        elif name.endswith("_bias"):
            found[name] = own  # the map has it
        else:  # a vector a sequence, to be multiplied with slots or with heads
            own = own.repeat_interleave(b, dim=0)[:, None]
            found[name] = own[:, None] if name in ("q_norm", "k_norm") else own
    return found


def read_diagonals(
    texts: Sequence[Tensor],
    row: Row,
    layout: Layout,
    global_state: Tensors,
    queue: Tensors,
    stacked: Stacked,
    params: Weights,
    config: CoMeTConfig,
) -> Iterator[tuple[Tensor, Tensors, Tensors]]:
    """Whole chunks that are alike, each closed, with full memories.

    Args:
        texts: of each chunk [b, w] ids, or [b, w, d] embeddings.
        row, layout: of any of them, all outputs asked for, see `stream.run_row`.
        global_state, queue: per layer, before the first; empty where there is no such memory.
        stacked: `stack_layers`.

    Yields:
        Of each chunk in order: the top layer's output at its text tokens, [b, w, d], and global state
        and queues after it.
    """
    layers, b = config.backbone.num_hidden_layers, len(texts[0])
    unrotated = config.backbone.unrotated_layers

    @cache
    def shared(first: int, last: int) -> tuple[dict[str, Any], Rotation, Rotation | None]:
        tables = [
            _tables(kinds, [i in unrotated for i in range(first, last)], b) if kinds else None
            for kinds in (layout.rotations, layout.opening)
        ]
        assert tables[0] is not None  # there are new slots
        return _choose(stacked, first, last, b), tables[0], tables[1]

    states, queues = [*global_state], [*queue]  # of each layer, after its latest chunk
    outputs: list[Tensor] = [texts[0]] * layers  # of each layer, of its latest chunk
    after: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # of chunks under way, both memories
    for step in range(len(texts) + layers - 1):
        first, last = max(0, step - len(texts) + 1), min(layers, step + 1)
        if first == 0:
            below = [embed(texts[step], row.source, params, config), *outputs[: last - 1]]
            after[step] = [], []
        else:
            below = outputs[first - 1 : last - 1]
        weights, rotation, opening = shared(first, last)
        hidden, _, _, state, entries = _run_layer(
            torch.cat(below),
            row,
            rotation,
            layout.mask,
            None,
            None,
            torch.cat(states[first:last]) if states else None,
            torch.cat(queues[first:last]) if queues else None,
            config,
            None,
            opening,
            layout.past,
            weights=weights,
        )
        outputs[first:last] = hidden.split(b)
        for memory, kept, new in ((0, states, state), (1, queues, entries)):
            if new is not None:
                kept[first:last] = new.split(b)
                for i in range(first, last):
                    after[step - i][memory].append(kept[i])
        if last == layers:
            of_chunk = after.pop(step - layers + 1)
            yield take_slots(outputs[-1], row.text), tuple(of_chunk[0]), tuple(of_chunk[1])


def _tables(kinds: Sequence[Rotation], stand: Sequence[bool], b: int) -> Rotation:
    """The rotary tables of layers: one for all, or [l * b, n, e] where some do not rotate."""
    if len(set(stand)) == 1:
        return kinds[stand[0]]
    cos, sin = zip(*(kinds[still] for still in stand for _ in range(b)), strict=True)
    return torch.cat(cos), torch.cat(sin)
