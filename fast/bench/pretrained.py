"""A pretrained model with memories beside the same model in transformers: reading, decoding, and what
is held afterwards. Both have the same weights, in the same dtype, and take turns in one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference.config import MemoryConfig

from ..model import CoMeTModel
from ..reading import MEMORY
from .speed import Timed, take_turns

__all__ = ["Measured", "decode", "import_transformers", "load_theirs", "measure", "table"]


@dataclass(frozen=True)
class Measured:
    """What both took."""

    length: int
    """Tokens of the text that is read."""

    context: int
    """Tokens before those that are decoded."""

    new: int
    """Tokens decoded."""

    reading: Timed
    """Of the text, and the logits after its last token."""

    decoding: Timed
    """Of the new tokens, greedily, after the context was read."""

    held: dict[str, int]
    """Bytes of the stream's state, or of the cache, after the text."""


def import_transformers() -> Any:
    """The package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ImportError(
            "the comparison takes the package transformers, which is not installed; run pip install "
            '"comet-memory[pretrained]".'
        ) from error
    return transformers


def load_theirs(backbone: Path, dtype: torch.dtype) -> Any:
    """The backbone in transformers.

    Raises:
        ImportError: the package `transformers` is not installed.
    """
    transformers = import_transformers()
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if backbone.is_file():
        options |= {
            "gguf_file": backbone.name,
            "quantization_config": transformers.GgufConfig(dequantize=True),
        }
        backbone = backbone.parent
    return transformers.AutoModelForCausalLM.from_pretrained(backbone, **options).eval()


def decode(model: Any, cache: Any, token: Tensor, new: int) -> Tensor:
    """Greedy tokens of transformers' model, [new], by the shortest loop around it."""
    tokens = []
    for _ in range(new):
        out = model(input_ids=token, cache=cache, use_cache=True, logits_to_keep=1)
        cache, token = out.cache, out.logits[:, -1:].argmax(dim=-1)
        tokens.append(token)
    return torch.cat(tokens, dim=1)[0]


@torch.inference_mode()
def _check_same(backbone: Path, prompt: Tensor, last: Tensor, new: int) -> None:
    """Raise AssertionError unless both choose the same tokens in float32, ours without memories."""
    plain = MemoryConfig(chunk_size=2**40, global_memory_size=0, compression_stride=0)
    alone = CoMeTModel.from_backbone(backbone, plain, torch.float32)
    theirs = load_theirs(backbone, torch.float32)
    cache = theirs(input_ids=prompt, use_cache=True, logits_to_keep=1).cache
    expected = decode(theirs, cache, last, new).tolist()
    if alone.generate(last, alone(prompt, logits="none").state, new).ids[0] != expected:
        raise AssertionError("the two models do not choose the same tokens.")


def measure(
    backbone: Path,
    *,
    length: int = 16384,
    context: int = 1024,
    new: int = 64,
    rounds: int = 3,
    dtype: torch.dtype = torch.float32,
    memory: MemoryConfig = MEMORY,
) -> Measured:
    """Time both on random tokens.

    Args:
        backbone: a folder or a GGUF file.
        length, context, new: see `Measured`.
        rounds: turns of each, after one that does not count.
        dtype: to compute in.
        memory: the memories.

    Raises:
        AssertionError: without memories, in one chunk, ours does not choose the tokens that theirs
            does.
    """
    ours = CoMeTModel.from_backbone(backbone, memory, dtype)
    generator = torch.Generator().manual_seed(0)
    size = (1, max(length, context))
    ids = torch.randint(ours.config.backbone.vocab_size, size, generator=generator)
    text, prompt, last = ids[:, :length], ids[:, : context - 1], ids[:, context - 1 : context]
    _check_same(backbone, prompt, last, new)
    theirs = load_theirs(backbone, dtype)
    held: dict[str, int] = {}

    def read_theirs() -> None:
        cache = theirs(input_ids=text, use_cache=True, logits_to_keep=1).cache
        held["transformers"] = sum(
            t.numel() * t.element_size()
            for layer in cache.layers
            for t in (layer.keys, layer.values)
        )

    def read_ours() -> None:
        held["CoMeT"] = ours(text, logits="last").state.num_bytes

    with torch.inference_mode():
        reading = take_turns({"transformers": read_theirs, "CoMeT": read_ours}, rounds)
        state = ours(prompt, logits="none").state

        def decode_theirs() -> None:
            cache = theirs(input_ids=prompt, use_cache=True, logits_to_keep=1).cache
            decode(theirs, cache, last, new)

        def read_prompt() -> None:
            theirs(input_ids=prompt, use_cache=True, logits_to_keep=1)

        def decode_ours() -> None:
            ours.generate(last, state, new)

        decoding = take_turns(
            {"transformers": decode_theirs, "its prompt": read_prompt, "CoMeT": decode_ours}, rounds
        )
    # A cache grows in place, so that each turn of theirs has to read the prompt anew.
    pairs = zip(decoding.seconds["transformers"], decoding.seconds["its prompt"], strict=True)
    decoding = Timed(
        {
            "transformers": [whole - part for whole, part in pairs],
            "CoMeT": decoding.seconds["CoMeT"],
        }
    )
    return Measured(length, context, new, reading, decoding, held)


def table(found: Measured) -> str:
    """A Markdown table: seconds, tokens a second, and how many times as fast."""
    lines = [
        f"| | reading {found.length:,} tokens | decoding {found.new} after {found.context:,} | held "
        "after reading |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in ("transformers", "CoMeT"):
        cells = [
            f"{timed.median(name):.1f} s, {tokens / timed.median(name):,.0f} tokens/s"
            for timed, tokens in ((found.reading, found.length), (found.decoding, found.new))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {found.held[name] / 1e6:,.1f} MB |")
    ratios = [t.median("transformers") / t.median("CoMeT") for t in (found.reading, found.decoding)]
    share = found.held["transformers"] / found.held["CoMeT"]
    lines.append(f"| times | {ratios[0]:.2f} | {ratios[1]:.2f} | {share:.1f} |")
    return "\n".join(lines)
