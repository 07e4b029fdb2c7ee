"""Processes that are killed while they save."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from fast import CoMeTModel, CoMeTState
from fast.checkpoints import read_training
from fast.files import UNFINISHED

from ..assertions import assert_state_equal
from ..strategies import random_model
from . import TEXT, same_weights, save_all, small


def saved_pairs(same_config: bool) -> list[tuple[CoMeTModel, CoMeTState]]:
    """Two models of other weights, and a state of each."""
    pairs = []
    for number in (0, 1):
        wide = {"vocab_size": 11 if same_config else 11 + number, "intermediate_size": 3000}
        model = random_model(small(wide), number)
        pairs.append((model, model(TEXT, logits="none").state))
    return pairs


def save_forever(folder: Path, same_config: bool, ready: Connection) -> None:
    """Save one pair's files and then the other's, until the process is killed."""
    torch.set_num_threads(1)
    with torch.no_grad():
        pairs = saved_pairs(same_config)
    ready.send(True)
    while True:
        for number, (model, state) in enumerate(pairs):
            save_all(folder, model, state, number)


def kill_writers(folder: Path, times: int, seed: int, same_config: bool) -> Counter:
    """Kill a process that saves, at a random moment, again and again; look at its files each time.

    Args:
        folder: empty; the files of one process are the next one's old ones.
        times: processes to kill.
        seed: of the moments.
        same_config: whether the two models have one config, so that weights and config fit always.

    Returns:
        How often each file was whole, how often a file was left unfinished, and how often config
        and weights were of two saves and refused.
    """
    rng, found = random.Random(seed), Counter()
    with torch.no_grad():
        pairs = saved_pairs(same_config)
    context = multiprocessing.get_context("forkserver")  # imports PyTorch once
    context.set_forkserver_preload(["parity.reliability.kills"])
    save_all(folder, *pairs[0], 0)
    for _ in range(times):
        ready, there = context.Pipe(duplex=False)
        process = context.Process(target=save_forever, args=(folder, same_config, there))
        process.start()
        assert ready.poll(60), "the process did not begin"
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.join()
        left = [path for path in folder.rglob("*") if path.name.endswith(UNFINISHED)]
        found["left unfinished"] += bool(left)
        found.update(_look_at_files(folder, pairs, same_config))
        for name in ("state", "training"):
            assert not [path for path in left if name in path.name][1:], "one writer, one file"
    save_all(folder, *pairs[0], 0)
    names = {path.name for path in folder.rglob("*")}
    assert names == {"state", "training", "model", "config.json", "model.safetensors"}, names
    return found


def _look_at_files(
    folder: Path, pairs: list[tuple[CoMeTModel, CoMeTState]], same_config: bool
) -> Counter:
    """Hold the files against what was saved: each is the one pair's or the other's."""
    loaded = []
    for model, state in pairs:
        with contextlib.suppress(ValueError):
            assert_state_equal(CoMeTState.load(folder / "state", model), state, "the state")
            loaded.append(model)
    assert len(loaded) == 1, "the state is that of one model"
    run, tensors = read_training(folder / "training")
    weights = pairs[run["number"]][0].state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in tensors.items())
    words = None
    try:
        model = CoMeTModel.from_pretrained(folder / "model")
    except ValueError as error:
        words = str(error)
    if words is not None:
        assert not same_config, words
        assert "a save was cut between the two" in words, words
        return Counter({"whole": 3, "of two saves, refused": 1})
    assert any(same_weights(model, expected) for expected, _ in pairs)
    return Counter({"whole": 4})
