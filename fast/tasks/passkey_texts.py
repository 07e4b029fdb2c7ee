"""Texts to train the pass key on: batches of one length, with keys where the options want them."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch
from torch import Tensor

from ..model import IGNORE
from . import passkey
from .passkey_recipe import Options

__all__ = ["Texts"]


class Texts:
    """A batch of texts of one length, with their keys.

    `ids` are their tokens, [b, n]; `keys` the numbers to give back; `starts` and `ends`, [b], where
    the keys' sentences start and end, in tokens.

    Args:
        options: whose spacings and places of keys they follow.
        batch_size: how many.
        haystack: prose, for six texts in ten; the others are the published filler.
        chunk: tokens of a chunk.
        rng: source of everything random.
        window: tokens of a window.
        windows: windows of a text; a chunk more is kept for what comes before the question.
        lead: windows before the key's, where `key_anywhere`.
    """

    def __init__(
        self,
        options: Options,
        batch_size: int,
        haystack: bytes,
        chunk: int,
        rng: np.random.Generator,
        window: int,
        windows: int,
        lead: int = 0,
    ) -> None:
        self.window, self.chunk = window, chunk
        length = window * windows + chunk
        rows, keys, starts, ends = [], [], [], []
        for _ in range(batch_size):
            # Most texts start anywhere, and most keys come early, so that they are asked for often.
            skip = 0 if rng.random() < 0.25 else len(passkey.DESCRIPTION) + 1
            reach = (
                min(1.0, window / length) if options.key_anywhere or rng.random() < 0.6 else 0.95
            )
            example = passkey.Example(
                length + skip + 200,
                depth=rng.random() * reach,
                seed=int(rng.integers(2**62)),
                haystack=None if rng.random() < 0.4 else haystack,
                spacing=float(rng.choice(options.spacings)),
                split="train",
            )
            if (
                options.key_anywhere
            ):  # half a chunk more than its window: asked for while it is read
                start = lead * window + int(rng.integers(window + chunk // 2))
                if rng.random() < options.border_share:
                    start = _cut(start, example.key, chunk, rng)
                example = _move(example, start + skip)
            row = passkey.encode(example.text()[skip : skip + length]).copy()
            if options.numbers and example.haystack is not None:
                places = int(rng.poisson(options.numbers * length / chunk))
                key = range(example.key_start - skip, example.key_end - skip)
                _write_numbers(row, places, key, rng)
            rows.append(row)
            keys.append(example.key)
            starts.append(example.key_start - skip)
            ends.append(example.key_end - skip)
        self.ids = torch.from_numpy(np.stack(rows))
        self.keys, self.starts, self.ends = keys, np.array(starts), np.array(ends)

    def part(self, rows: slice) -> Texts:
        """Some of them."""
        part = copy.copy(self)
        part.ids, part.keys = self.ids[rows], self.keys[rows]
        part.starts, part.ends = self.starts[rows], self.ends[rows]
        return part

    def cutting_tail(self, rng: np.random.Generator) -> int:
        """A tail after which a chunk's border is somewhere in the answer."""
        return self.chunk - len(passkey.QUESTION) - 1 - int(rng.integers(len(" 12345.\n") + 1))

    def ask(self, end: int, tail: int, gone_by: np.ndarray) -> tuple[Tensor, Tensor]:
        """What follows the window that ends at `end`: text, the question, and the answer.

        Args:
            end: tokens up to the end of the window.
            tail: tokens of text before the question.
            gone_by: [b], whether the key has gone by; the others have no target.

        Returns:
            Ids, [b, tail + question + answer - 1]: all but the answer's last. Targets,
            [b, answer], IGNORE where there is none.
        """
        question = passkey.encode(f"\n{passkey.QUESTION}")
        said = [passkey.encode(passkey.ANSWER.format(key=key)) for key in self.keys]
        longest = max(map(len, said))
        answer = torch.tensor([[*a, *[0] * (longest - len(a))] for a in said])
        known = torch.tensor([[i < len(a) for i in range(longest)] for a in said])
        targets = answer.masked_fill(~(known & torch.from_numpy(gone_by)[:, None]), IGNORE)
        asked = torch.from_numpy(question).expand(len(said), -1)
        ids = torch.cat([self.ids[:, end : end + tail], asked, answer], dim=1)
        return ids[:, :-1], targets


def _cut(start: int, key: int, chunk: int, rng: np.random.Generator) -> int:
    """The nearest start of a key's sentence that puts a border into one of its two mentions."""
    said, digits = passkey.INFORMATION.format(key=key), str(key)
    mention = said.index(digits) if rng.random() < 0.5 else said.rindex(digits)
    border = start + mention + int(rng.integers(len(digits) + 1))
    return start - ((border + chunk // 2) % chunk - chunk // 2)


def _move(example: passkey.Example, start: int) -> passkey.Example:
    """The example with its key's sentence at a byte, or as near to it as its text allows."""
    first, last = (dataclasses.replace(example, depth=d).key_start for d in (0.0, 1.0))
    return dataclasses.replace(example, depth=min(max((start - first) / (last - first), 0.0), 1.0))


def _write_numbers(row: np.ndarray, places: int, key: range, rng: np.random.Generator) -> None:
    """Write numbers of any form over a text, the key's sentence excepted."""
    for _ in range(places):
        join = (" ", ", ", "\n", "   ", ".", ":", "-", ",", "")[rng.integers(9)]
        base = "0123456789abcdef"[: 16 if rng.random() < 0.2 else 10]
        words = []
        for _ in range(int(rng.integers(1, 7))):
            digits = rng.integers(len(base), size=int(rng.integers(1, 9)))
            words.append(
                ("", "", "0x", "$", "-")[rng.integers(5)] + "".join(base[i] for i in digits)
            )
        said = passkey.encode(join.join(words))
        start = int(rng.integers(len(row)))
        end = min(start + len(said), len(row))
        if end <= key.start or start >= key.stop:
            row[start:end] = said[: end - start]
