"""Chats to train on: the published training's form of data.

A file has one chat a line, a JSON object whose "messages" is a list of {"role", "content"}, or that
list as JSON in a string. A chat becomes tokens by the model's chat template, and what the assistant
says is what is predicted. Chats are then packed: one after the other into one text, as long as the
next one fits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import shown
from ..files import check_regular
from ..inputs import IGNORE

__all__ = ["Labelled", "encode_chat", "pack", "read_chats"]


@dataclass(frozen=True)
class Labelled:
    """A text with its labels."""

    ids: np.ndarray
    """[n] int64."""

    labels: np.ndarray
    """[n] int64: a token's own id where it is predicted, else IGNORE."""


def read_chats(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The chats of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not of the form.
    """
    check_regular(path)
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)["messages"]
                messages = json.loads(found) if isinstance(found, str) else found
                chat = [{"role": m["role"], "content": m["content"]} for m in messages]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} is no chat ({error!r}); expected an object with "
                    '"messages", a list of {"role": ..., "content": ...}.'
                ) from error
            yield chat


def encode_chat(tokenizer: Any, chat: list[dict[str, Any]]) -> Labelled:
    """A chat's tokens; those of the assistant's messages are predicted.

    Args:
        tokenizer: of transformers, with a chat template.
        chat: messages.

    Raises:
        ValueError: the template does not write a chat as its beginning and what comes after.
    """

    def tokens(messages: list[dict[str, Any]], prompt: bool) -> list[int]:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt).input_ids

    ids = np.array(tokens(chat, False), dtype=np.int64)
    labels = np.full_like(ids, IGNORE)
    for i, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before, after = (tokens(chat[: i + k], not k) if i + k else [] for k in (0, 1))
        if ids[: len(after)].tolist() != after or after[: len(before)] != before:
            raise ValueError(
                "the tokenizer's chat template writes the beginning of a chat otherwise than the "
                f"whole one ({shown(message)}), so what the assistant says cannot be told apart; "
                "train on plain text instead."
            )
        labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return Labelled(ids, labels)


def pack(chats: Iterable[Labelled], length: int) -> list[Labelled]:
    """Chats one after the other in texts of at most so many tokens.

    Args:
        chats: in the order in which they come; one that is longer is cut off, one of which nothing is
            predicted is left out.
        length: tokens of a text, at most.
    """
    texts: list[list[Labelled]] = []
    free = 0
    for chat in chats:
        cut = Labelled(chat.ids[:length], chat.labels[:length])
        if (cut.labels == IGNORE).all():
            continue
        if len(cut.ids) > free:
            texts.append([])
            free = length
        texts[-1].append(cut)
        free -= len(cut.ids)
    return [
        Labelled(
            np.concatenate([chat.ids for chat in text]),
            np.concatenate([chat.labels for chat in text]),
        )
        for text in texts
    ]
