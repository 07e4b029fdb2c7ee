"""Faults of behaviour: what a person would get wrong about arguments that meet.

An argument is ignored beside another, a rule is applied to one sequence or to all, a count is taken
from the call in place of the stream. Each fault is a function put in the place of one of `fast/`'s,
so that a rewrite of what it does inside does not void it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import fast.cupy_engine.engine as engine_module
import fast.cupy_engine.stream as engine_stream
import fast.model as model_module
import fast.state as state_module
from fast import IGNORE, CoMeTModel, CoMeTState, stream
from fast.cupy_engine import CoMeTEngine

from . import test_decoding
from .strategies import VOCAB

Fault = tuple[Any, str, Callable[[Any], Any], str]
"""Whose function, its name, what makes the wrong function of the right one, and the law that must
notice."""

FAULTS: dict[str, Fault] = {}


def fault(what: str, owner: Any, name: str, law: str = "walk") -> Callable[[Any], Any]:
    """Enter the decorated function, which makes a wrong function of a right one, as a fault."""

    def enter(wrong: Any) -> Any:
        assert what not in FAULTS
        FAULTS[what] = owner, name, wrong, law
        return wrong

    return enter


def is_open(state: CoMeTState | None) -> bool:
    """Whether some chunk is open."""
    return state is not None and bool(state.open_tokens.any())


def without(what: str, name: str, when: Callable[[dict[str, Any]], Any], law: str = "walk") -> None:
    """Faults of reading in both paths: an argument is ignored where `when` says so of the others."""
    for owner, method, who in (
        (CoMeTModel, "forward", ""),
        (CoMeTEngine, "__call__", "the engine: "),
    ):
        if owner is CoMeTEngine and name in ("labels", "backprop_chunks"):
            continue

        @fault(f"{who}{what}", owner, method, law)
        def wrong(real: Any) -> Any:
            def read(self: Any, ids: Any, **options: Any) -> Any:
                if when(options):
                    options[name] = None
                    if name == "lengths":  # padding is text, and its labels are labels
                        ids = ids.clip(0, VOCAB - 1)
                        if options.get("labels") is not None:
                            options["labels"] = options["labels"].clip(IGNORE, VOCAB - 1)
                return real(self, ids, **options)

            return read


without(
    "chunk_sizes ignored where a chunk is open", "chunk_sizes", lambda o: is_open(o.get("state"))
)
without(
    "chunk_sizes ignored where only the last logits are asked for",
    "chunk_sizes",
    lambda o: o.get("logits") == "last",
)
without("chunk_sizes ignored while a recorder watches", "chunk_sizes", lambda o: o.get("recorder"))
without("lengths ignored where a state is passed", "lengths", lambda o: o.get("state") is not None)
without(
    "lengths ignored where the last logits are asked for",
    "lengths",
    lambda o: o.get("logits") == "last",
)
without("lengths ignored in a tuple", "lengths", lambda o: isinstance(o.get("lengths"), tuple))
without(
    "lengths ignored in an array of int32",
    "lengths",
    lambda o: getattr(o.get("lengths"), "dtype", None) == np.int32,
)
without(
    "the state ignored where chunks are cut by hand",
    "state",
    lambda o: o.get("chunk_sizes") is not None,
)
without(
    "backprop_chunks ignored where a state is passed",
    "backprop_chunks",
    lambda o: o.get("state") is not None,
    "gradients",
)
without(
    "backprop_chunks ignored beside chunk_sizes",
    "backprop_chunks",
    lambda o: o.get("chunk_sizes") is not None,
    "gradients",
)
without(
    "backprop_chunks ignored beside labels",
    "backprop_chunks",
    lambda o: o.get("labels") is not None,
    "gradients",
)
without(
    "backprop_chunks ignored where lengths are given",
    "backprop_chunks",
    lambda o: o.get("lengths") is not None,
    "gradients",
)
without(
    "labels ignored where chunks are cut by hand",
    "labels",
    lambda o: o.get("chunk_sizes") is not None,
)
without(
    "labels ignored where no logits are asked for", "labels", lambda o: o.get("logits") == "none"
)


@fault("a state that loses its graph where labels are given", CoMeTModel, "forward", "gradients")
def _(real):
    def forward(self, ids, *, state=None, labels=None, **options):
        if labels is not None and state is not None:
            state = state.detach()
        return real(self, ids, state=state, labels=labels, **options)

    return forward


@fault("chunks by hand that do not go on with the open chunk", CoMeTModel, "forward")
def _(real):
    def forward(self, ids, *, state=None, chunk_sizes=None, **options):
        if chunk_sizes is not None and is_open(state):
            state = self.close_chunk(state)
        return real(self, ids, state=state, chunk_sizes=chunk_sizes, **options)

    return forward


@fault("the last chunk by hand closed", CoMeTModel, "forward")
def _(real):
    def forward(self, ids, *, chunk_sizes=None, **options):
        out = real(self, ids, chunk_sizes=chunk_sizes, **options)
        return (
            out
            if chunk_sizes is None
            else dataclasses.replace(out, state=self.close_chunk(out.state))
        )

    return forward


@fault("a chunk that is full when the call ends closed", CoMeTModel, "forward")
def _(real):
    def forward(self, ids, **options):
        out = real(self, ids, **options)
        if (out.state.open_tokens >= self.config.memory.chunk_size).all():
            out = dataclasses.replace(out, state=self.close_chunk(out.state))
        return out

    return forward


@fault("the text's own ids as labels", CoMeTModel, "forward")
def _(real):
    def forward(self, ids, *, labels=None, **options):
        if labels is not None:
            labels = torch.where(labels == IGNORE, labels, ids.clamp(0, 10).to(labels.dtype))
        return real(self, ids, labels=labels, **options)

    return forward


@fault("labels that are not shifted", model_module, "shift_labels")
def _(real):
    def shift(labels, lengths):
        is_text = np.arange(labels.shape[1]) < lengths[:, None]
        kept = labels.masked_fill(torch.from_numpy(~is_text).to(labels.device), IGNORE)
        return kept.where((kept >= 0) & (kept < 11), IGNORE)

    return shift


@fault("labels predicted by their own call's first sequence alone", model_module, "shift_labels")
def _(real):
    def shift(labels, lengths):
        targets = real(labels, lengths)
        targets[1:] = IGNORE
        return targets

    return shift


@fault("the loss a mean over all tokens, ignored ones too", CoMeTModel, "forward")
def _(real):
    def forward(self, ids, *, labels=None, lengths=None, **options):
        out = real(self, ids, labels=labels, lengths=lengths, **options)
        if out.loss is None or labels.shape[-1] < 2:
            return out
        predicted = (labels[..., 1:] != IGNORE).sum() / labels[..., 1:].numel()
        return dataclasses.replace(out, loss=out.loss * predicted)

    return forward


@fault("the loss a mean of the sequences' means", CoMeTModel, "forward")
def _(real):
    def forward(self, ids, *, labels=None, lengths=None, state=None, **options):
        out = real(self, ids, labels=labels, lengths=lengths, state=state, **options)
        if out.loss is None or ids.dim() == 1 or out.logits is None or out.logits.shape[1] == 1:
            return out
        sizes = torch.as_tensor(
            np.asarray(lengths if lengths is not None else [ids.shape[1]] * len(ids))
        )
        targets = model_module.shift_labels(labels.long(), sizes.numpy())
        means = [
            model_module.sum_of_losses(x[t != IGNORE], t[t != IGNORE]) / (t != IGNORE).sum()
            for x, t in zip(out.logits, targets, strict=True)
            if (t != IGNORE).any()
        ]
        return dataclasses.replace(out, loss=torch.stack(means).mean() if means else out.loss)

    return forward


@fault("the last column's logits, not each sequence's last", stream.Reading, "last")
def _(real):
    return lambda self, previous: self.hidden[:, -1] if self.hidden.shape[1] else previous


@fault("the last logits of the last round, whoever read in it", stream.Reading, "last")
def _(real):
    return lambda self, previous: real(self, None) if self.hidden.shape[1] else previous


@fault("the engine: the last logits of the last round", engine_stream.Reading, "last")
def _(real):
    return lambda self, previous: real(self, None) if self.hidden.shape[1] else previous


for module, who in ((stream, ""), (engine_stream, "the engine: ")):

    @fault(f"{who}chunks counted from the call, not from the stream", module, "plan_rounds")
    def _(real):
        return lambda lengths, open_tokens, *rest: real(lengths, np.zeros_like(open_tokens), *rest)

    @fault(f"{who}chunks closed where the fullest is", module, "plan_rounds")
    def _(real):
        def plan(lengths, open_tokens, *rest):
            return real(lengths, np.full_like(open_tokens, open_tokens.max()), *rest)

        return plan

    @fault(f"{who}every chunk closed with the first that closes", module, "plan_rounds")
    def _(real):
        def plan(*arguments):
            for found in real(*arguments):
                yield dataclasses.replace(found, close=found.close | found.close.any())

        return plan

    @fault(f"{who}rows of a batch begun anew where one begins", module, "open_chunk")
    def _(real):
        return lambda state, params, config, opens=None, *rest: real(
            state, params, config, None, *rest
        )


@fault("gradients cut for all sequences where one is", stream, "_detach_rows", "gradients")
def _(real):
    return lambda state, rows: real(state, rows | rows.any())


@fault("gradients cut for no sequence where not for all", stream, "_detach_rows", "gradients")
def _(real):
    return lambda state, rows: real(state, rows & rows.all())


@fault("gradients cut in the global memory alone", stream, "_detach_rows", "gradients")
def _(real):
    def cut(state, rows):
        return dataclasses.replace(state, global_state=real(state, rows).global_state)

    return cut


@fault("gradients cut in the queue alone", stream, "_detach_rows", "gradients")
def _(real):
    def cut(state, rows):
        return dataclasses.replace(state, temporary_memory=real(state, rows).temporary_memory)

    return cut


@fault("gradients cut at borders counted from the call", model_module, "read", "gradients")
def _(real):
    def read(ids, state, params, config, *, backprop_chunks=None, **options):
        cut, before = stream._detach_rows, state.chunks

        def counted(state, rows):
            borders = (state.open_tokens == 0) & ((state.chunks - before) % backprop_chunks == 0)
            return cut(state, borders & (state.chunks > before))

        stream._detach_rows = counted
        try:
            yield from real(ids, state, params, config, backprop_chunks=backprop_chunks, **options)
        finally:
            stream._detach_rows = cut

    return read


@fault("a chunk closed by hand only where all are open", CoMeTModel, "close_chunk", "changes")
def _(real):
    def close(self, state, **options):
        return real(self, state, **options) if (state.open_tokens > 0).all() else state

    return close


@fault("chunks counted as closed where none was open", CoMeTModel, "close_chunk", "changes")
def _(real):
    def close(self, state, **options):
        chunks = state.chunks + (state.tokens > 0)
        return dataclasses.replace(real(self, state, **options), chunks=chunks)

    return close


@fault("forks in the order of the batch, not side by side", CoMeTState, "fork", "changes")
def _(real):
    return lambda self, copies=1: self._take(np.tile(np.arange(self.batch_size), copies))


@fault("forks of the first sequence's counts", CoMeTState, "fork", "changes")
def _(real):
    def fork(self, copies=1):
        found = real(self, copies)
        return dataclasses.replace(found, tokens=np.repeat(self.tokens[:1], found.batch_size))

    return fork


@fault("picked sequences sorted", CoMeTState, "select", "changes")
def _(real):
    return lambda self, rows: real(self, sorted(rows))


@fault("a sequence picked twice the same slots of the first", CoMeTState, "select", "changes")
def _(real):
    def select(self, rows):
        found = real(self, rows)
        return found.map_tensors(lambda t: t[:1].expand_as(t).clone())

    return select


@fault("picked counts in the old order", CoMeTState, "select", "changes")
def _(real):
    def select(self, rows):
        if len(rows) != self.batch_size:
            return real(self, rows)
        return dataclasses.replace(real(self, rows), queue_length=self.queue_length)

    return select


@fault("batches joined in the other order", CoMeTState, "cat", "changes")
def _(real):
    return classmethod(lambda cls, states: real(states[::-1]))


@fault("rows filled up in front, not at the end", CoMeTState, "cat", "changes")
def _(real):
    def cat(cls, states):
        found = real(states)
        longest = found.keys[0].shape[2]
        shift = [longest - state.keys[0].shape[2] for state in states for _ in state.tokens]
        keys = tuple(
            torch.stack([row.roll(by, dims=1) for row, by in zip(k, shift, strict=True)])
            for k in found.keys
        )
        return dataclasses.replace(found, keys=keys)

    return classmethod(cat)


@fault("queues forgotten by all where one forgets", CoMeTState, "forget_temporary", "changes")
def _(real):
    def forget(self, rows=None):
        found = real(self, rows)
        if rows is not None and np.any(rows):
            found = dataclasses.replace(found, queue_length=0 * self.queue_length)
        return found

    return forget


@fault("the first queue alone forgotten", CoMeTState, "forget_temporary", "changes")
def _(real):
    def forget(self, rows=None):
        found = real(self, rows)
        if rows is None:
            kept = np.where(np.arange(self.batch_size) == 0, 0, self.queue_length)
            found = dataclasses.replace(found, queue_length=kept)
        return found

    return forget


@fault("which queues are forgotten ignored in a tuple", CoMeTState, "forget_temporary", "changes")
def _(real):
    return lambda self, rows=None: self if isinstance(rows, tuple) else real(self, rows)


@fault("a state saved in float32", CoMeTState, "save", "changes")
def _(real):
    def save(self, *path):
        return real(self.map_tensors(lambda t: t.float() if hasattr(t, "float") else t), *path)

    return save


@fault("a saved batch loaded in the other order", CoMeTState, "load", "changes")
def _(real):
    def load(cls, *where, **options):
        state = real(*where, **options)
        return state.select(range(state.batch_size)[::-1])

    return classmethod(load)


@fault("a saved queue loaded as zeros where it is short", CoMeTState, "load", "changes")
def _(real):
    def load(cls, *where, **options):
        state = real(*where, **options)
        short = tuple(t * (t.shape[1] > 2) for t in state.temporary_memory)
        return dataclasses.replace(state, temporary_memory=short)

    return classmethod(load)


@fault("reading that writes into the memories it was given", CoMeTModel, "forward")
def _(real):
    def forward(self, ids, *, state=None, **options):
        out = real(self, ids, state=state, **options)
        if state is not None:
            for memory in (*state.global_state, *state.temporary_memory):
                memory.detach().mul_(1.5)
        return out

    return forward


@fault("decoding that writes into the row it was given", CoMeTModel, "generate")
def _(real):
    def generate(self, ids, state=None, **options):
        out = real(self, ids, state=state, **options)
        if state is not None:
            for k in state.keys:
                k.detach().mul_(1.5)
        return out

    return generate


def decoded(what: str, change: Callable[..., dict[str, Any]], law: str = "walk") -> None:
    """Faults of decoding in both paths: the arguments are changed first."""
    for owner, who in ((CoMeTModel, ""), (CoMeTEngine, "the engine: ")):

        @fault(f"{who}{what}", owner, "generate", law)
        def wrong(real: Any) -> Any:
            def generate(self: Any, ids: Any, **options: Any) -> Any:
                changes = change(options)
                if "lengths" in changes:
                    ids = ids.clip(0, VOCAB - 1)  # padding is text
                return real(self, ids, **(options | changes))

            return generate


def is_sampled(options: dict[str, Any]) -> bool:
    """Whether tokens are drawn."""
    return bool(options.get("temperature"))


decoded(
    "lengths ignored in decoding where a state is passed",
    lambda o: {"lengths": None} if o.get("state") is not None else {},
)
decoded(
    "stop_ids ignored where tokens are sampled", lambda o: {"stop_ids": ()} if is_sampled(o) else {}
)
decoded(
    "stop_ids ignored where chunks never close", lambda o: {} if o["roll"] else {"stop_ids": ()}
)
decoded("the first stop id alone", lambda o: {"stop_ids": tuple(o["stop_ids"])[:1]})
decoded("roll ignored where tokens are sampled", lambda o: {"roll": True} if is_sampled(o) else {})
decoded(
    "roll ignored where stop_ids are given", lambda o: {"roll": True} if len(o["stop_ids"]) else {}
)
decoded("top_k ignored beside top_p", lambda o: {"top_k": None} if o["top_p"] else {})
decoded("top_p ignored beside top_k", lambda o: {"top_p": None} if o["top_k"] else {})
decoded(
    "one more new token where tokens are sampled",
    lambda o: {"max_new_tokens": o["max_new_tokens"] + is_sampled(o)},
)
decoded(
    "on_token ignored where tokens are sampled",
    lambda o: {"on_token": None} if is_sampled(o) else {},
)


@fault("all sequences stopped by the first that stops", CoMeTModel, "generate")
def _(real):
    def generate(self, ids, *, stop_ids=(), **options):
        out = real(self, ids, stop_ids=stop_ids, **options)
        shortest = min(map(len, out.ids))
        return dataclasses.replace(out, ids=[new[:shortest] for new in out.ids])

    return generate


@fault("no stop id but in the first sequence", CoMeTModel, "generate")
def _(real):
    def generate(self, ids, *, stop_ids=(), **options):
        whole, out = real(self, ids, **options), real(self, ids, stop_ids=stop_ids, **options)
        return dataclasses.replace(out, ids=[*out.ids[:1], *whole.ids[1:]])

    return generate


@fault("the stop token left out", CoMeTModel, "generate")
def _(real):
    def generate(self, ids, *, stop_ids=(), **options):
        out = real(self, ids, stop_ids=stop_ids, **options)
        kept = [new[:-1] if new and new[-1] in stop_ids else new for new in out.ids]
        return dataclasses.replace(out, ids=kept)

    return generate


@fault("a state that has not read the new tokens", CoMeTModel, "generate")
def _(real):
    def generate(self, ids, *, max_new_tokens=128, on_token=None, **options):
        out = real(self, ids, max_new_tokens=max_new_tokens, on_token=on_token, **options)
        return dataclasses.replace(out, state=real(self, ids, max_new_tokens=0, **options).state)

    return generate


def chosen(what: str, wrong: Callable[[Any], Any], law: str) -> None:
    """Faults of choosing the next token, in both paths."""
    fault(what, model_module, "sample", law)(wrong)
    fault(f"the engine: {what}", engine_module, "sample", law)(wrong)


def changed_choice(change: Callable[..., tuple[Any, ...]]) -> Callable[[Any], Any]:
    """What calls the right function with other arguments."""
    return lambda real: lambda *arguments: real(*change(*arguments))


chosen(
    "every sequence's token from the first one's logits",
    changed_choice(lambda logits, *rest: (logits[:1] + 0 * logits, *rest)),
    "walk",
)
chosen(
    "tokens of the batch in the other order",
    lambda real: (
        lambda logits, *rest: (
            real(logits, *rest)[::-1].copy()
            if isinstance(logits, np.ndarray)
            else real(logits, *rest).flip(0)
        )
    ),
    "walk",
)
chosen(
    "one more token among the likeliest",
    changed_choice(lambda logits, t, k, p, g: (logits, t, None if k is None else k + 1, p, g)),
    "walk",
)

for what, change in {
    "temperature ignored beside top_k": lambda x, t, k, p, g: (x, 1.0 if k else t, k, p, g),
    "temperature ignored beside top_p": lambda x, t, k, p, g: (x, 1.0 if p else t, k, p, g),
    "top_p ignored beside top_k, in the chances": lambda x, t, k, p, g: (
        x,
        t,
        k,
        None if k else p,
        g,
    ),
    "top_k ignored where temperature is above one": lambda x, t, k, p, g: (
        x,
        t,
        None if t > 1 else k,
        p,
        g,
    ),
    "a batch that samples from its first sequence": lambda x, t, k, p, g: (
        x[:1].expand_as(x),
        t,
        k,
        p,
        g,
    ),
}.items():
    fault(what, test_decoding, "sample", "chances")(changed_choice(change))


@fault("a state's rules asked of its first sequence alone", CoMeTState, "check", "contradictions")
def _(real):
    def check(self, config, batch_size, like):
        return real(self.select([0]), config, 1, like)

    return check


@fault("a state's rules asked of the batch as a whole", CoMeTState, "check", "contradictions")
def _(real):
    def check(self, config, batch_size, like):
        told = []
        for i in range(self.batch_size):
            try:
                real(self.select([i]), config, 1, like)
            except ValueError as error:
                told.append(error)
        if len(told) == self.batch_size:
            raise told[0]

    return check


for name in ("rope_theta", "gate_saturation", "temporary_norm_eps", "trailing_compression"):

    @fault(f"{name} forgotten in the name of a config", state_module, "_plain", "fields")
    def _(real, name=name):
        def plain(value):
            found = real(value)
            if isinstance(found, dict):
                found.pop(name, None)
            return found

        return plain
