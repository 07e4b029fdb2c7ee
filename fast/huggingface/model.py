"""`CoMeTModel` as a causal language model of transformers.

What transformers passes in columns, with an attention mask, is read as each row's real tokens in
their order, and what comes out is put back into the columns. Compression and readout tokens are
never among them. All that is computed is computed by `fast.stream` and `fast.model`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from reference.config import MemoryConfig

from ..arrays import shown
from ..inputs import IGNORE, check_ids, check_kind, check_labels, check_vocabulary
from ..layers import rms_norm, take_slots, tensor_of
from ..model import CoMeTModel, for_gradients, predict, shift_labels, sum_of_losses
from ..parameters import ParameterTree, Vector
from ..state import CoMeTState
from ..stream import Reading, join, read
from .cache import CoMeTCache
from .columns import Columns
from .config import CoMeTPretrainedConfig
from .generation import FOREIGN, StreamGenerationMixin

__all__ = ["CoMeTForCausalLM"]

REFUSED = {
    "output_attentions": "attention is not kept; a fast.Recorder of a CoMeTModel tells of it",
    "position_ids": "positions follow from attention_mask and the stream",
    "past_key_values": "transformers 5.24 calls it cache",
}
"""Arguments of other models, and why this one does not take them."""


class _Layers:
    """A recorder that keeps each layer's input at the text tokens of every round."""

    def __init__(self) -> None:
        self.rounds: list[list[Tensor]] = []

    def begin(self, *_: Any) -> None:
        self.rounds.append([])

    def layer(
        self, before: Tensor, _after: Any, _keys: Any, _states: Any, row: Any, *_: Any
    ) -> None:
        self.rounds[-1].append(take_slots(before, row.text))


class _Cell(GradientCheckpointingLayer):
    """How cells are called in training: transformers turns on here that they are recomputed."""

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


class CoMeTForCausalLM(PreTrainedModel, StreamGenerationMixin):
    """A model of transformers around a `CoMeTModel`, which is its `model`.

    `generate`, `Trainer`, `save_pretrained` and `from_pretrained` are those of transformers. Where
    a stream stands is in `out.cache`, a `CoMeTCache`, to be given to the next call.
    """

    config: CoMeTPretrainedConfig
    config_class = CoMeTPretrainedConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True
    _is_stateful = True  # assisted decoding takes tokens back, which memories cannot
    _supports_sdpa = True
    _no_split_modules = ["CoMeTModel"]  # noqa: RUF012

    def __init__(self, config: CoMeTPretrainedConfig) -> None:
        """A model with fresh weights, in PyTorch's default dtype and on its default device."""
        super().__init__(config)
        device = torch.empty(0).device
        with torch.device("meta"):
            self.model = CoMeTModel(config.to_comet())
        if device.type != "meta":
            self.model.to_empty(device=device)
        self.cell = _Cell()
        self.post_init()

    @classmethod
    def from_model(cls, model: CoMeTModel, **options: Any) -> Self:
        """A model of transformers around one of ours, whose weights it shares.

        Args:
            model: a `CoMeTModel`.
            options: other fields of its `CoMeTPretrainedConfig`, such as eos_token_id.
        """
        check_kind("model", model, CoMeTModel, "a CoMeTModel")
        config = CoMeTPretrainedConfig.from_comet(model.config, dtype=model.dtype, **options)
        with torch.device("meta"):  # nothing is drawn
            own = cls(config)
        own.model = model
        return own

    @classmethod
    def from_backbone(
        cls,
        source: str | Path | nn.Module,
        memory: MemoryConfig | str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Self:
        """A pretrained model with memories, fresh or trained: `CoMeTModel.from_backbone`, and how the
        backbone generates.

        Args:
            source: a folder as transformers writes it, a GGUF file, or a model of transformers.
            memory, dtype, device, options: as there.
        """
        own = cls.from_model(CoMeTModel.from_backbone(source, memory, dtype, device, **options))
        if isinstance(source, PreTrainedModel) and source.can_generate():
            own.generation_config = copy.deepcopy(source.generation_config)
        elif isinstance(source, (str, Path)) and (Path(source) / "generation_config.json").exists():
            own.generation_config = GenerationConfig.from_pretrained(source)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(own.config, name, getattr(own.generation_config, name))
        return own

    def _init_weights(self, module: nn.Module) -> None:
        """As `reference.parameters.initialize` starts them."""
        if not isinstance(module, (ParameterTree, Vector)):
            super()._init_weights(module)
            return
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("norm"):
                init.ones_(parameter)
            elif name.endswith("bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, std=0.02)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: CoMeTCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Read text, and predict.

        Args:
            input_ids: [b, n] token ids in [0, vocab_size); where the mask is 0, any.
            attention_mask: [b, n], or [b, columns of the cache + n]: 1 at tokens, 0 at padding,
                which may stand at the left, at the right and between. Of a mask that covers the
                cache only the last n columns are looked at. None is all 1.
            cache: where the streams stand; None starts new ones. It moves on in place.
            inputs_embeds: [b, n, d] embeddings in place of input_ids, in the model's dtype.
            labels: [b, n] a token's own id, or -100 where it is not predicted. They are shifted
                inside: a token is predicted from the token before it in its row, across padding;
                a row's first is not predicted, and labels of padding are not looked at.
            use_cache: whether a new cache is returned; None is the config's word. A given one
                always is.
            logits_to_keep: as everywhere in transformers: 0 is all columns, k the last k, a tensor
                names columns. What is not asked for is not computed.
            output_hidden_states: whether the embeddings, every layer's output and, last, the
                output after the final norm are returned; None is the config's word.
            return_dict: False returns a tuple; None is the config's word.
            num_items_in_batch: what the sum of the losses is divided by, as `Trainer` gives it;
                None is the number of labels.
            others: refused, unless they are None or False.

        Returns:
            `loss`; `logits` [b, k, vocab], at a column of padding those after the last token
            before it, zero before the first; `cache`; `hidden_states`, a tuple of [b, n, d], zero
            in the padding.

        Raises:
            ValueError: an argument does not fit; the message says which, and what would.
        """
        _refuse(others)
        text, is_ids = self._check_text(input_ids, inputs_embeds)
        own, (state, before) = cache, self._stand(cache, len(text))
        columns = Columns.of(attention_mask, text, 0 if cache is None else cache.columns)
        ids, text = text if is_ids else None, columns.pack(text)
        if is_ids:
            check_vocabulary(text, self.model.config.backbone.vocab_size)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        recorder = _Layers() if output_hidden_states else None
        of_one = not isinstance(logits_to_keep, Tensor) and logits_to_keep == 1
        only_last = of_one and labels is None and recorder is None
        parts, last, n = [], before, text.shape[1]
        for part in read(
            text,
            state,
            self.model.weights,
            self.model.config,
            lengths=columns.lengths,
            outputs="last" if only_last else "all",
            recorder=cast(Any, recorder),
            recompute=self.cell if self.training else None,
            layers=self.model._layers,
        ):
            state, last = part.state, cast(Tensor, part.last(last))
            if not only_last:
                parts.append(part)

        if only_last:
            hidden = kept = last[:, None]
        else:
            hidden = columns.unpack(_join(parts, n, before), before)
            kept = slice_logits_to_keep(hidden, logits_to_keep)
        logits = predict(kept, self.model.weights, self.model.config)
        loss = None
        if labels is not None:
            targets = self._targets(labels, columns, text)
            is_whole = not isinstance(logits_to_keep, Tensor) and logits.shape[:2] == targets.shape
            loss = self._loss(logits if is_whole else None, hidden, targets, num_items_in_batch)
        if own is None and (self.config.use_cache if use_cache is None else use_cache):
            own = CoMeTCache()
        if own is not None:
            own.advance(state, last, ids, n)
        found = None if recorder is None else self._layers(recorder, parts, hidden, columns)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, cache=own, hidden_states=found)
        keep = self.config.return_dict if return_dict is None else return_dict
        return out if keep else out.to_tuple()

    def _check_text(self, input_ids: Any, inputs_embeds: Any) -> tuple[Tensor, bool]:
        """What is to be read, [b, n] ids or [b, n, d] embeddings, and whether it is ids."""
        like = self.model.weights["norm"]
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds, and not both.")
        if input_ids is not None:
            return check_ids(input_ids, like), True
        check_kind("inputs_embeds", inputs_embeds, Tensor, "a tensor [batch, tokens, hidden_size]")
        shape = tuple(inputs_embeds.shape)
        if (
            len(shape) != 3
            or 0 in shape
            or shape[2] != len(like)
            or inputs_embeds.dtype != like.dtype
        ):
            raise ValueError(
                f"inputs_embeds has shape {shape} and dtype {inputs_embeds.dtype}; expected [batch, "
                f"tokens, {len(like)}] of {like.dtype}, with at least one token."
            )
        return inputs_embeds, False

    def _stand(self, cache: Any, b: int) -> tuple[CoMeTState, Tensor]:
        """Where the streams of a cache stand: the state, and the last output [b, d]."""
        if cache is not None:
            check_kind("cache", cache, CoMeTCache, FOREIGN)
        if cache is None or cache.state is None:
            state = self.model.new_state(b)
        else:
            cache.state.check(self.model.config, b, self.model.weights["norm"])
            state = for_gradients(cache.state)
        if cache is None or cache.last is None:
            return state, self.model.weights["norm"].new_zeros(b, self.config.hidden_size)
        return state, cache.last.clone() if cache.last.is_inference() else cache.last

    def _targets(self, labels: Any, columns: Columns, text: Tensor) -> Tensor:
        """[b, n]: what each column predicts, the label of the next token in its row, or IGNORE."""
        check_kind("labels", labels, Tensor, "a tensor like input_ids, such as input_ids itself")
        b, n = shape = text.shape[:2]
        if labels.shape != shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}; expected {(b, n)}, as the text has."
            )
        like = torch.zeros(shape, dtype=torch.int64, device=text.device)
        sizes, vocab_size = columns.lengths, self.model.config.backbone.vocab_size
        packed = check_labels(columns.pack(labels), like, sizes, vocab_size)
        targets = shift_labels(packed, sizes)
        return columns.zero(columns.unpack(targets, targets[:, 0]), IGNORE)

    def _loss(
        self, logits: Tensor | None, hidden: Tensor, targets: Tensor, count: int | Tensor | None
    ) -> Tensor:
        """Sum of the losses over a count, that of the targets where it is None.

        Args:
            logits: [b, n, vocab]; None where they are of other columns than hidden's [b, n, d].
        """
        predicted = targets != IGNORE
        if logits is None:
            targets = targets[predicted]
            logits = predict(hidden[predicted], self.model.weights, self.model.config)
        whole = predicted.sum() if count is None else torch.as_tensor(count, device=logits.device)
        return sum_of_losses(logits, targets) / whole

    def _layers(
        self, recorder: _Layers, parts: list[Reading], hidden: Tensor, columns: Columns
    ) -> tuple[Tensor, ...]:
        """Hidden states in columns: the embeddings, every layer's output, the last one normed."""
        n, zeros = hidden.shape[1], torch.zeros_like(hidden[:, 0])
        number, eps = self.config.num_hidden_layers, self.config.rms_norm_eps
        found = []
        for i in range(number):
            of_layer = [
                dataclasses.replace(part, hidden=layers[i])
                for part, layers in zip(parts, recorder.rounds, strict=True)
            ]
            found.append(columns.zero(columns.unpack(_join(of_layer, n, zeros), zeros)))
        top = rms_norm(hidden, self.model.weights["norm"], eps)
        return (*found, columns.zero(top))

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Called by transformers: keep only the inputs of every cell for the backward pass.

        Raises:
            ValueError: it is asked for in a form that memories do not go with.
        """
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and options.get("use_reentrant"):
            raise ValueError(
                "use_reentrant is True; expected False: no gradient would reach the memories."
            )
        if enable and every_n_layers != 1:
            raise ValueError(f"every_n_layers is {shown(every_n_layers)}; expected 1, every layer.")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)

    def get_input_embeddings(self) -> nn.Module:
        """The module of the embeddings."""
        return cast(nn.Module, self.model.weights["embed_tokens"])

    def get_output_embeddings(self) -> nn.Module:
        """The output projection as a module; where it is tied, a view of the embeddings, whose
        hooks are not called.
        """
        if not self.model.config.backbone.tie_word_embeddings:
            return cast(nn.Module, self.model.weights["lm_head"])
        table = tensor_of(self.model.weights["embed_tokens"])
        view = nn.Linear(table.shape[1], table.shape[0], bias=False, device="meta")
        view.weight = cast(nn.Parameter, table)
        return view

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Take another module of embeddings, of any number of rows: the vocabulary.

        Raises:
            ValueError: its weight has no rows of the hidden size.
        """
        self.model.weights.embed_tokens = self._checked(value)
        self.config.vocab_size = len(tensor_of(value))
        self.model.config = self.config.to_comet()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Take another output projection; where it is tied, its weight for the embeddings'."""
        if self.model.config.backbone.tie_word_embeddings:
            table = tensor_of(self._checked(new_embeddings))
            self.set_input_embeddings(nn.Embedding.from_pretrained(table, freeze=False))
        else:
            self.model.weights.lm_head = self._checked(new_embeddings)

    def _checked(self, module: nn.Module) -> nn.Module:
        """The module, which has a weight with rows of the hidden size."""
        weight, d = getattr(module, "weight", None), self.config.hidden_size
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != d:
            raise ValueError(
                f"the module's weight is {shown(getattr(weight, 'shape', weight))}; expected [rows, "
                f"{d}], a row for each token."
            )
        return module


def _refuse(others: dict[str, Any]) -> None:
    """Raise ValueError for arguments that would be ignored in silence."""
    for name, value in others.items():
        if value is not None and value is not False:
            hint = REFUSED.get(name, "forward takes no such argument")
            raise ValueError(
                f"{name} is {type(value).__name__} {shown(value)}; leave it out: {hint}."
            )


def _join(parts: list[Reading], n: int, like: Tensor) -> Tensor:
    """`stream.join`, zeros where all is padding; like is [b, d]."""
    return join(parts, n) if parts else like.new_zeros(len(like), n, like.shape[1])
