"""CoMeT in lm-evaluation-harness, the package lm_eval: its tasks, over contexts of any length.

    python -m fast.tasks.lm_harness --model comet --model_args model=FOLDER --tasks lambada_openai

lm_eval finds models of its own alone, so this is its own command, `lm_eval`, to which the name "comet"
has been told. In Python, to import this module tells it: `lm_eval.simple_evaluate("comet", ...)`.

A context is never cut. It is read once, in pieces of which no logits are kept, whatever is asked after
it, and its state is forked for all that goes on from it. Logits are made where a token is scored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..arrays import shown
from ..checkpoints import read_json
from ..inputs import IGNORE, check_choice, check_count, check_logits, check_sampling
from ..layers import widen
from ..machine import keep_memory
from ..model import CoMeTModel
from ..pretrained.text import ByteText, TokenText, open_text
from ..reading import DTYPES, MEMORY, Source
from ..state import CoMeTState
from .harness import PIECE
from .samples import Words

try:
    # Its own models are registered only while no other is: `--model hf` is to stay.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import simple_parse_args_string
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise ImportError(
        f"lm-evaluation-harness is not installed ({error.name} is missing); run pip install "
        '"comet-memory[evaluation]".'
    ) from error

__all__ = ["CoMeTLM", "main"]

LOGITS = 2**26
"""Logits that are held at once, where tokens are scored; those of a token a stream, if these are more."""

LINE_BREAK = 10
"""Stands before a text without context, where a model reads bytes."""

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the most tokens of an answer, the first one given before the others."""

Item = TypeVar("Item")


class _AllEnded(Exception):  # noqa: N818
    """Every answer has come to its end."""


@register_model("comet")
class CoMeTLM(TemplateLM):
    """A model that answers lm_eval's requests.

    Args:
        model: a folder: a checkpoint of CoMeT's with its tokenizer, or of a model that reads bytes, or
            what `fast.huggingface` has saved; or a `CoMeTModel`.
        backbone: in place of `model`, a pretrained model's folder or GGUF file, with memories.
        memories: of a backbone, a file that `train memories` wrote; None starts fresh ones.
        chunk_size, global_memory_size, temporary_memory_size, compression_stride, seed: of fresh
            memories; None is 1024, 8, 256, 8 and 0.
        dtype: to compute in, one of `reading.DTYPES`; None is that of the files.
        device: to compute on. Where PyTorch has no CUDA, "cuda" is the CPU: lm_eval's command gives
            "cuda:0" where its user gives nothing.
        batch_size: streams that are read side by side.
        words: the tokenizer of a `CoMeTModel`; None is bytes.

    Raises:
        ImportError: a package that the model takes is not installed.
        OSError, ValueError: the model or its tokenizer is missing, damaged, or does not fit; or
            arguments do not fit each other.
    """

    max_gen_toks = 256
    """New tokens of an answer, at most, where a task does not say."""

    def __init__(
        self,
        model: str | Path | CoMeTModel | None = None,
        *,
        backbone: str | Path | None = None,
        memories: str | Path | None = None,
        chunk_size: int | None = None,
        global_memory_size: int | None = None,
        temporary_memory_size: int | None = None,
        compression_stride: int | None = None,
        seed: int | None = None,
        dtype: str | None = None,
        device: str | torch.device | None = None,
        batch_size: int | str = 1,
        words: Words | None = None,
    ) -> None:
        super().__init__()
        if isinstance(batch_size, str) and batch_size.isdecimal():  # as lm_eval's command gives it
            batch_size = int(batch_size)
        self.batch_size = check_count("batch_size", batch_size, 1)  # type: ignore[arg-type]
        if isinstance(model, CoMeTModel):
            self.model, self.words = model, ByteText() if words is None else words
        else:
            sizes = {
                "chunk_size": chunk_size,
                "global_memory_size": global_memory_size,
                "temporary_memory_size": temporary_memory_size,
                "compression_stride": compression_stride,
                "seed": seed,
            }
            fresh = {name: size for name, size in sizes.items() if size is not None}
            self.model, self.words = _open(model, backbone, memories, fresh, dtype)
        if device is not None and (torch.cuda.is_available() or "cuda" not in str(device)):
            self.model.to(device)
        self._device = self.model.device
        self.tokenizer = self.words.tokenizer if isinstance(self.words, TokenText) else None
        # A line break ends an answer of a model that reads bytes only where a task says so.
        self._stop_ids = self.words.stop_ids if self.tokenizer is not None else ()

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> CoMeTLM:
        """As `create_from_arg_obj`, of "name=value,name=value"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> CoMeTLM:
        """A model of the arguments in `--model_args`, which stand before those of lm_eval's own options
        (`--batch_size`, `--device`): these have values even where nobody gave one.
        """
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**given | arg_dict)

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text; None where there is none, as among bytes."""
        return None if self.tokenizer is None else self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What is read before a text that has no context: the token that starts a text, or else ends
        one; among bytes a line break.

        Raises:
            ValueError: the tokenizer has neither.
        """
        if self.tokenizer is None:
            return LINE_BREAK
        found = self.tokenizer.bos_token_id
        found = self.eot_token_id if found is None else found
        if found is None:
            raise ValueError(
                "a request has no context, and the tokenizer has neither bos_token nor eos_token to "
                "stand there; give it one of them, or leave this task out."
            )
        return found

    @property
    def tokenizer_name(self) -> str:
        """Of the tokenizer, by which lm_eval tells kept requests apart."""
        return "bytes" if self.tokenizer is None else self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as the tokenizer's template writes it.

        Args:
            chat_history: messages, each with "role" and "content".
            add_generation_prompt: whether the model is to begin a message; False goes on with the last.

        Raises:
            ValueError: there is no template.
        """
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise ValueError(
                "the model's tokenizer has no chat template; leave --apply_chat_template out."
            )
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The tokens of a text. Unlike `Words.encode`, special tokens in it are read as such: those of
        a chat template are meant.

        Args:
            string: the text.
            add_special_tokens: False leaves out what the tokenizer puts before a text. It is not put
                there a second time.
        """
        if self.tokenizer is None:
            return self.words.encode(string)
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False).input_ids
        start = [*self.words.start]
        return ids if add_special_tokens is False or ids[: len(start)] == start else start + ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **others: Any,
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation) with the tokens of both: how likely it is that the second
        goes on from the first, in nats, and whether the model would say just that.

        Raises:
            ValueError: a continuation has no tokens.
        """
        for (context, continuation), _, ids in requests:
            if not ids:
                raise ValueError(
                    f"the continuation {shown(continuation)} of {shown(context[-40:])} has no tokens "
                    "of its own; begin it with a space, or take that sample out of the task."
                )
        pairs = [(context or [self.prefix_token_id], ids) for _, context, ids in requests]
        found = [(0.0, False)] * len(requests)
        for number, answer in self._rate(pairs, "loglikelihood", disable_tqdm):
            found[number] = answer
            self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Of each text: how likely all of its tokens are, in nats, after `prefix_token_id`. It is one
        stream, however long it is: there are no windows.
        """
        texts = [request.args[0] for request in requests]
        start = [self.prefix_token_id]
        pairs = [(start, self.tok_encode(text, add_special_tokens=False)) for text in texts]
        found = [0.0] * len(requests)
        for number, (nats, _) in self._rate(pairs, "loglikelihood_rolling", disable_tqdm):
            found[number] = nats
            self.cache_hook.add_partial("loglikelihood_rolling", (texts[number],), nats)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context, up to a string of `until` or a token that ends a text.

        Raises:
            ValueError: a task wants what `CoMeTModel.generate` does not do.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        options = [_options(requests[own[0]].args[1], self.max_gen_toks) for own in groups.values()]
        contexts = [self.tok_encode(r.args[0]) or [self.prefix_token_id] for r in requests]
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for own, (until, sampling) in zip(groups.values(), options, strict=True):
                asked = [contexts[number] for number in own]
                for places, state in self._forks(asked, [0] * len(asked)):
                    last = [asked[place][-1] for place in places]
                    for place, said in zip(
                        places, self._say(last, state, until, sampling), strict=True
                    ):
                        found[own[place]] = said
                        self.cache_hook.add_partial(
                            "generate_until", requests[own[place]].args, said
                        )
                    bar.update(len(places))
        return found

    def _rate(
        self, pairs: Sequence[tuple[list[int], list[int]]], name: str, disable_tqdm: bool
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """The number and the answer of each (context, continuation), as it is there."""
        contexts = [context for context, _ in pairs]
        with tqdm(total=len(pairs), desc=name, disable=disable_tqdm) as bar:
            for numbers, state in self._forks(contexts, [len(ids) for _, ids in pairs]):
                texts = [
                    torch.tensor([contexts[number][-1], *pairs[number][1]]) for number in numbers
                ]
                yield from zip(numbers, self._score(state, texts), strict=True)
                bar.update(len(numbers))

    def _forks(
        self, contexts: Sequence[Sequence[int]], following: Sequence[int]
    ) -> Iterator[tuple[list[int], CoMeTState]]:
        """Streams that have read contexts but for their last tokens, the longest first. What several
        requests have in common is read once.

        Args:
            contexts: [n] tokens of each, one at least.
            following: [n] how many tokens will follow each.

        Yields:
            The numbers of at most `batch_size` contexts, those first that more tokens follow; and
            where their streams stand.
        """
        own: dict[tuple[int, ...], list[int]] = {}
        for number, context in enumerate(contexts):
            own.setdefault(tuple(context), []).append(number)
        for batch in self._batches(sorted(own, key=len, reverse=True)):
            state = self._read([torch.tensor(context[:-1]).long() for context in batch])
            asked = [(row, number) for row, context in enumerate(batch) for number in own[context]]
            asked.sort(key=lambda one: -following[one[1]])
            for part in self._batches(asked):
                yield [number for _, number in part], state.select([row for row, _ in part])

    def _batches(self, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        """Items in their order, `batch_size` at a time."""
        for first in range(0, len(items), self.batch_size):
            yield items[first : first + self.batch_size]

    @torch.no_grad()
    def _read(self, texts: Sequence[Tensor]) -> CoMeTState:
        """Where streams stand after texts [n] of any lengths, the longest first; one may be empty."""
        state, ended = self.model.new_state(len(texts)), list[CoMeTState]()
        for first in range(0, len(texts[0]), PIECE):
            parts = [text[first : first + PIECE] for text in texts if len(text) > first]
            if len(parts) < state.batch_size:
                ended.append(state.select(range(len(parts), state.batch_size)))
                state = state.select(range(len(parts)))
            ids = pad_sequence(parts, batch_first=True).to(self._device)
            state = self.model(ids, lengths=[*map(len, parts)], state=state, logits="none").state
        return CoMeTState.cat([state, *reversed(ended)])

    @torch.no_grad()
    def _score(self, state: CoMeTState, texts: Sequence[Tensor]) -> list[tuple[float, bool]]:
        """How likely all tokens but the first of texts [n] are, in nats, the longest first, and whether
        each is the likeliest.

        Args:
            state: where the streams stand before their first tokens.
        """
        nats, greedy = np.zeros(len(texts)), np.ones(len(texts), bool)
        width = min(PIECE, max(1, LOGITS // (len(texts) * self.model.config.backbone.vocab_size)))
        for first in range(0, len(texts[0]) - 1, width):
            parts = [text[first : first + width + 1] for text in texts if len(text) > first + 1]
            rows = len(parts)
            if rows < state.batch_size:
                state = state.select(range(rows))
            ids = pad_sequence([part[:-1] for part in parts], batch_first=True).to(self._device)
            targets = pad_sequence(
                [part[1:] for part in parts], batch_first=True, padding_value=IGNORE
            ).to(self._device)
            out = self.model(ids, lengths=[len(part) - 1 for part in parts], state=state)
            check_logits(out.logits.amax(dim=-1))
            state, logits = out.state, widen(out.logits)
            losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # [b, n]
            is_right = (logits.argmax(dim=-1) == targets) | (targets == IGNORE)
            nats[:rows] -= losses.cpu().numpy().sum(axis=1, dtype=np.float64)
            greedy[:rows] &= is_right.all(dim=1).cpu().numpy()
        return list(zip(nats.tolist(), greedy.tolist(), strict=True))

    def _say(
        self, last: Sequence[int], state: CoMeTState, until: list[str], sampling: dict[str, Any]
    ) -> list[str]:
        """What streams go on with after one more token each, without the string that ends it.

        Args:
            last: [b] those tokens.
            state: where the streams stand before them.
            until: strings that end an answer, however many tokens they lie in.
            sampling: arguments of `CoMeTModel.generate`.
        """
        decoders = [self.words.decoder() for _ in last]
        said, running = [""] * len(last), set(range(len(last)))

        def hear(tokens: list[int | None]) -> None:
            for row in [*running]:
                token = tokens[row]
                if token is None or token in self._stop_ids:
                    running.discard(row)
                    continue
                said[row] += decoders[row](token)
                if any(end in said[row] for end in until):
                    running.discard(row)
            if not running:
                raise _AllEnded

        ids = torch.tensor(last, device=self._device)[:, None]
        with suppress(_AllEnded):
            self.model.generate(ids, state, stop_ids=self._stop_ids, on_token=hear, **sampling)
        for end in until:
            said = [text.partition(end)[0] for text in said]
        return said


def _open(
    model: str | Path | None,
    backbone: str | Path | None,
    memories: str | Path | None,
    fresh: dict[str, Any],
    dtype: str | None,
) -> tuple[CoMeTModel, Words]:
    """The model that arguments of `CoMeTLM` name, and how its text becomes tokens.

    Args:
        model, backbone, memories, dtype: as there.
        fresh: what was given of fresh memories.
    """
    if (model is None) == (backbone is None):
        raise ValueError(
            f"model is {shown(model)}, backbone {shown(backbone)}; give one of them in --model_args."
        )
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    foreign = [*fresh, *(["memories"] if model is not None and memories is not None else [])]
    if foreign and (model is not None or memories is not None):
        named = "model" if model is not None else "memories"
        raise ValueError(
            f"{', '.join(foreign)} with {named}, which has memories of its own; leave one out."
        )
    if model is not None:
        config = Path(model) / "config.json"
        if config.is_file() and read_json(config).get("model_type") == "comet":
            from ..huggingface import CoMeTForCausalLM

            found = CoMeTForCausalLM.from_pretrained(model, dtype=dtype or "auto").model
            return found, open_text(Path(model), found.config.backbone.vocab_size)
        return Source(str(model), dtype=dtype).open()
    seed = fresh.pop("seed", 0)
    memory = str(memories) if memories is not None else dataclasses.replace(MEMORY, **fresh)
    return Source(str(backbone), memory, seed, dtype).open()


def _options(given: dict[str, Any], most: int) -> tuple[list[str], dict[str, Any]]:
    """What a task's generation_kwargs come to: strings that end an answer, and arguments of
    `CoMeTModel.generate`.

    Args:
        most: tokens of an answer, where they do not say.

    Raises:
        ValueError: they name what `generate` does not do, or are out of range.
    """
    rest = dict(given)
    until = rest.pop("until", None) or []
    limits = [limit for name in LIMITS if (limit := rest.pop(name, None)) is not None]
    does_sample, temperature = rest.pop("do_sample", None), rest.pop("temperature", None)
    if does_sample is False or (does_sample is None and temperature is None):
        temperature = 0.0
    sampling = {
        "max_new_tokens": check_count("max_gen_toks", [*limits, most][0], 0),
        "temperature": 1.0 if temperature is None else temperature,
        "top_k": rest.pop("top_k", None) or None,  # 0 is off, as in transformers
        "top_p": rest.pop("top_p", None),
    }
    if rest.get("num_beams") == 1:
        del rest["num_beams"]
    if rest:
        told = ", ".join(f"{name}={shown(value)}" for name, value in rest.items())
        raise ValueError(
            f"generation_kwargs has {told}; expected until, max_gen_toks, do_sample, temperature, "
            "top_k and top_p alone. Change the task, or leave it out."
        )
    check_sampling(sampling["temperature"], sampling["top_k"], sampling["top_p"])
    return [end for end in ([until] if isinstance(until, str) else until) if end], sampling


def main() -> None:
    """Run lm_eval's command, which knows "comet" now."""
    from lm_eval.__main__ import cli_evaluate

    keep_memory()
    cli_evaluate()


if __name__ == "__main__":
    main()
