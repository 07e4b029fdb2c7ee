"""The literal schedule: the equations as they stand, chunk by chunk, with nothing left out.

Each chunk's row is made anew and goes through every operation of every layer, memory slots
included, and their outputs are dropped, as the published code does. It is the yardstick for the
savings of `fast/`, and `parity/test_literal.py` holds both to one result.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reference.config import CoMeTConfig

from ..cells import embed
from ..chunking import Round
from ..global_memory import read_global, update_global
from ..layers import Weights, decoder_layer, for_heads, rotary_tables, take_slots
from ..rows import lay_out
from ..state import CoMeTState
from ..stream import new_state
from ..temporary_memory import update_temporary

__all__ = ["read_literal"]


def read_literal(
    ids: Tensor,
    params: Weights,
    config: CoMeTConfig,
    state: CoMeTState | None = None,
    close_last: bool = False,
) -> Tensor:
    """Read whole texts of one length.

    Args:
        ids: [b, n] token ids, n >= 1.
        params: a model's weights.
        config: the model.
        state: memories to start from, those of streams that are alike and have no open chunk;
            None starts without.
        close_last: whether the last chunk closes too.

    Returns:
        [b, n, d], the top layer's output at the text tokens.
    """
    memory, backbone = config.memory, config.backbone
    layers = params["layers"]
    start = ids.new_zeros((len(ids), 0, backbone.hidden_size), dtype=params["norm"].dtype)
    states: list[Tensor | None] = [None for _ in layers]
    queues = [start for _ in layers]
    if state is not None:
        states = list(state.global_state) or states
        queues = list(state.temporary_memory) or queues
    none = start.new_zeros(len(ids), backbone.num_key_value_heads, 0, backbone.head_dim)
    pieces = ids.split(memory.chunk_size, dim=1)
    outputs = []
    for number, text in enumerate(pieces):
        closes = close_last or number + 1 < len(pieces)
        take = np.array([text.shape[1]])
        plan = Round(start=0 * take, take=take, close=np.array([closes]))
        layout = lay_out(new_state(config), plan, memory, text.shape[1])
        layout = layout.map(lambda x, widths: torch.from_numpy(x).to(ids.device).split(widths, 1))
        hidden = embed(text, layout.source, params, config)
        for i, weights in enumerate(layers):
            old = states[i]
            seen = [] if old is None else [read_global(old, weights["global_memory"])]
            row = torch.cat([*seen, queues[i], hidden], dim=1)  # [b, m + q + n, d]
            slots = row.shape[1] - hidden.shape[1]
            positions = torch.arange(row.shape[1])[None]
            cos, sin = rotary_tables(positions, backbone)[i in backbone.unrotated_layers]
            rotation = for_heads((cos.to(row), sin.to(row)))
            positions = positions.to(row.device)
            row, _, _ = decoder_layer(row, none, none, positions, rotation, weights, backbone)
            hidden = row[:, slots:]
            if layout.compression.shape[1]:
                compression = take_slots(hidden, layout.compression)
                net = weights["temporary_memory"]
                queues[i] = update_temporary(queues[i], compression, net, memory)
            if layout.readout.shape[1]:
                readout = take_slots(hidden, layout.readout)
                states[i] = update_global(old, readout, weights["global_memory"], memory)
        outputs.append(take_slots(hidden, layout.text))
    return torch.cat(outputs, dim=1)
