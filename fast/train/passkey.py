"""Training a byte-level model from scratch to find a pass key.

Every step reads one window of a few chunks of a batch of texts, then asks, on a fork of the
state, for the keys that have gone by. The texts then go on from the state before the question,
without gradient across the window's start. No text is longer than 4,096 tokens.

What the curriculum raises is the number of chunks in a window and of windows in a text, as soon
as the questions are answered.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from reference.config import BackboneConfig, CoMeTConfig, MemoryConfig

from ..model import IGNORE, CoMeTModel
from ..state import CoMeTState
from ..tasks import passkey


def small_config(hidden=64, layers=3, saturation=0.95) -> CoMeTConfig:
    return CoMeTConfig(
        BackboneConfig(
            vocab_size=256,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 16,
            num_key_value_heads=hidden // 16,
            head_dim=16,
        ),
        MemoryConfig(
            chunk_size=128,
            global_memory_size=8,
            temporary_memory_size=16,
            compression_stride=8,
            gate_bias=True,
            gate_saturation=saturation,
        ),
    )


STAGES = ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 7))
"""Chunks in a window, windows in a text at most; the last is 28 chunks and a tail."""


@dataclass(frozen=True)
class Recipe:
    steps: int = 6000
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup: int = 100
    decay_from: float = 0.5
    language_weight: float = 0.2
    noise: float = 0.02
    hide_queue: float = 0.3
    raise_at: float = 0.9
    seed: int = 0


def learning_rate(recipe: Recipe, step: int) -> float:
    warm = min(1.0, (step + 1) / recipe.warmup)
    left = (recipe.steps - step) / (recipe.steps * (1 - recipe.decay_from))
    return recipe.learning_rate * warm * min(1.0, max(left, 0.02))


class Trainer:
    def __init__(self, config, recipe, folder):
        self.recipe, self.folder = recipe, Path(folder)
        self.model = CoMeTModel(config, seed=recipe.seed)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.dim() > 1 and "adapter" not in name and "gate" != name.rsplit(".", 1)[-1]:
                    p.mul_(4.0)
                if name.endswith("gate_bias"):
                    p.fill_(2.0)
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
            lr=recipe.learning_rate, betas=(0.9, 0.95))
        self.rng = np.random.default_rng(recipe.seed)
        torch.manual_seed(recipe.seed)
        self.step = 0
        self.stage = 0
        self.accuracy = 0.0
        self.by = {}
        self.haystack = passkey.read_haystack(split="train")

    def documents(self, length, reach):
        """Bytes [b, length + chunk] of texts without question, keys, ends."""
        texts, keys, ends = [], [], []
        for _ in range(self.recipe.batch_size):
            early = self.rng.random() < 0.6
            depth = self.rng.random() * (min(1.0, reach / length) if early else 0.95)
            kind = self.rng.random()
            hay = None if kind < 0.4 else self.haystack
            spacing = float(self.rng.choice([150, 400, 1500]))
            q = len(passkey.QUESTION) + 1
            skip = 0 if self.rng.random() < 0.25 else len(passkey.DESCRIPTION) + 1
            e = passkey.make_example(length + skip + q, depth, self.rng, hay, spacing)
            texts.append(passkey.encode(e.text)[skip : skip + length])
            keys.append(e.key)
            ends.append(e.key_end - skip)
        return np.stack(texts), np.array(keys), np.array(ends)

    def run(self):
        r, chunk = self.recipe, self.model.config.memory.chunk_size
        bar = tqdm(total=r.steps, initial=self.step, mininterval=10)
        while self.step < r.steps:
            w, most = STAGES[self.stage]
            if self.rng.random() < 0.25:
                w, most = STAGES[self.rng.integers(self.stage + 1)]
            windows = int(self.rng.integers(1, most + 1)) if most > 1 else 1
            texts, keys, ends = self.documents((w * windows + 1) * chunk + 300, w * chunk)
            ids = torch.from_numpy(texts)
            state = None
            for i in range(windows):
                if self.step >= r.steps:
                    break
                state = self.window(ids, keys, ends, state, i * w * chunk, w * chunk, bar)
                if self.step % 500 == 0:
                    self.save()
        self.save()

    def window(self, ids, keys, ends, state, start, length, bar):
        r, chunk = self.recipe, self.model.config.memory.chunk_size
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(r, self.step)
        if state is not None:
            state = dataclasses.replace(state, global_state=tuple(
                s + r.noise * torch.randn_like(s) for s in state.global_state))
        part = ids[:, start : start + length]
        first = start == 0
        out = self.model(part, labels=part, state=state, logits="none")
        end = start + length
        tail = int(self.rng.integers(0, chunk))
        keys_seen = ends <= end + tail
        forked = self.model.close_chunk(out.state)
        carried = forked
        if self.rng.random() < r.hide_queue:
            forked = forked.forget_temporary()
            keys_seen = ends <= end
        question = passkey.encode("\n" + passkey.QUESTION)
        answers = [passkey.encode(passkey.ANSWER.format(key=k)) for k in keys]
        n = max(map(len, answers))
        labels = np.full((len(keys), n), IGNORE)
        for row, a in enumerate(answers):
            if keys_seen[row]:
                labels[row, : len(a)] = a
        padded = np.stack([np.pad(a, (0, n - len(a))) for a in answers])
        # the tail lies so that the question may be cut by the border anywhere
        ask = np.concatenate([ids[:, end : end + tail].numpy(), np.tile(question, (len(keys), 1)), padded], 1)
        res = self.model(torch.from_numpy(ask[:, :-1]), state=forked, logits="all")
        logits = res.logits[:, -n:]
        target = torch.from_numpy(labels)
        loss = r.language_weight * out.loss
        asked = target != IGNORE
        if asked.any():
            answer_loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE)
            loss = loss + answer_loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if torch.isfinite(norm):
            self.optimizer.step()
        if asked.any():
            right = ((logits.argmax(-1) == target) | ~asked).all(1).numpy()
            acc = right[keys_seen].mean()
            self.accuracy += 0.02 * (acc - self.accuracy)
            old = keys_seen & (ends <= start)
            for n_, sel in (("new", keys_seen & (ends > start)), ("old", old)):
                if sel.any():
                    self.by[n_] = 0.98 * self.by.get(n_, 0) + 0.02 * right[sel].mean()
        self.step += 1
        if self.accuracy > r.raise_at and self.stage + 1 < len(STAGES):
            self.stage += 1
            self.accuracy = 0.0
        if self.step % 50 == 0:
            print(json.dumps(dict(step=self.step, stage=self.stage, lm=round(out.loss.item(), 3),
                ans=round(answer_loss.item(), 3) if asked.any() else None, acc=round(self.accuracy, 3),
                by={k: round(float(v), 3) for k, v in self.by.items()}, t=int(time.time()) % 100000)), flush=True)
        bar.update(1)
        return carried.detach()

    def save(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(dict(model=self.model.state_dict(), opt=self.optimizer.state_dict(), step=self.step, stage=self.stage,
            config=self.model.config.to_json(), by=self.by), self.folder / "proto.pt")
