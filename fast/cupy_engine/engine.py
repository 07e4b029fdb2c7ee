"""`CoMeTEngine`: the model's face on arrays, for inference; twin of `reference/model.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import ml_dtypes
import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj, is_cupy_array

from reference.config import CoMeTConfig
from reference.parameters import map_parameters, shapes

from ..arrays import FLOATS, Array, dtype_name, dtype_of, shown, to_host
from ..checkpoints import check_weights, load_checkpoint, named_tensors
from ..inputs import (
    MOST_STREAMS,
    check_call,
    check_choice,
    check_chunk_sizes,
    check_count,
    check_flag,
    check_kind,
    check_logits,
    check_sampling,
    check_state,
    check_stop_ids,
    check_watchers,
)
from ..state import CoMeTState
from .layers import Weights, linear, rms_norm
from .libraries import import_library
from .sampling import sample
from .stream import Reading, close_chunk, join, new_state, read

if TYPE_CHECKING:
    from ..recorder import Recorder

__all__ = ["CoMeTEngine", "EngineGeneration", "EngineOutput", "predict"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def predict(hidden: Array, params: Weights, config: CoMeTConfig) -> Array:
    """Logits: W rms_norm(H'), W the embedding table where tied. Twin of
    `reference.model.predict`.

    Args:
        hidden: [..., d], the top layer's output at text tokens.

    Returns:
        [..., vocab].
    """
    tied = config.backbone.tie_word_embeddings
    table = params["embed_tokens"] if tied else params["lm_head"]
    return linear(rms_norm(hidden, params["norm"], config.backbone.rms_norm_eps), table)


@dataclass(frozen=True)
class EngineOutput:
    """What a call returns."""

    state: CoMeTState
    """Where the streams stand after the text."""

    logits: Array | None
    """[b, n, vocab] for logits="all", zero after a sequence's length; [b, 1, vocab], after each
    sequence's last token, for "last"; None for "none"."""


@dataclass(frozen=True)
class EngineGeneration:
    """What `generate` returns."""

    ids: list[list[int]]
    """New tokens of every sequence, the stop token included where one was reached."""

    state: CoMeTState
    """Where the streams stand: they have read the new tokens too."""


@contextmanager
def _enough_memory(what: str) -> Iterator[None]:
    """Tell what to do where memory runs out."""
    try:
        yield
    except MemoryError as error:
        raise MemoryError(f"there is not enough memory for {what} ({error}).") from error


def _on_device(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a method compute on the device of the weights, which CuPy makes arrays on only then."""

    @functools.wraps(method)
    def run(*args: Parameters.args, **options: Parameters.kwargs) -> Result:
        engine: Any = args[0]
        what = "the call: read fewer sequences at once, or take a narrower dtype"
        is_cupy = is_cupy_array(engine.weights["norm"])
        with engine.device if is_cupy else nullcontext(), _enough_memory(what):
            return method(*args, **options)

    return run


class CoMeTEngine:
    """A CoMeT model on arrays, for inference: the face of `CoMeTModel`, without PyTorch.

    `engine(ids)` reads a text, `engine(more, state=out.state)` reads on. Arrays are those of one
    library, on one device; the weights decide which.
    """

    framework = "np"
    """Whose arrays files are read as."""

    def __init__(self, config: CoMeTConfig, weights: dict[str, Any]) -> None:
        """An engine of given weights.

        Args:
            config: the model.
            weights: nested dict of arrays under the names of `reference.parameters.shapes`, which
                are not copied.

        Raises:
            ValueError: weights that do not fit the config, are not arrays of one library and
                device, or hold NaN or infinity.
        """
        check_kind("config", config, CoMeTConfig, "a CoMeTConfig")
        if not isinstance(weights, dict):
            raise ValueError(
                f"weights is a {type(weights).__name__}; expected a nested dict of arrays. Of a "
                "CoMeTModel, make an engine with CoMeTEngine.from_model(model)."
            )
        first: Any = weights.get("norm")
        if not is_array_api_obj(first):
            raise ValueError(
                f"the weight norm is a {type(first).__name__}; expected an array, e.g. of NumPy or "
                "CuPy."
            )
        map_parameters(lambda name, x: _check_home(name, x, first), weights)
        if dtype_name(first) not in FLOATS:
            raise ValueError(
                f"the weights are {first.dtype}; the engine computes in {', '.join(FLOATS)}, so "
                "convert them."
            )
        check_weights(weights, config)
        self.config, self.weights = config, weights
        self.xp = array_namespace(first)

    @property
    def device(self) -> Any:
        """Device of the weights."""
        return device(self.weights["norm"])

    @property
    def dtype(self) -> Any:
        """Dtype of the weights."""
        return self.weights["norm"].dtype

    def place(self, array: Array) -> Array:
        """An array of any library as one of the engine's, on its device, in its dtype."""
        array = array if array_namespace(array) is self.xp else to_host(array)
        return self.xp.asarray(array, dtype=self.dtype, device=self.device)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: str | None = None,
        device: Any = None,
        *,
        library: str | Any = "cupy",
    ) -> CoMeTEngine:
        """Read a model that `CoMeTModel.save_pretrained` wrote, or an official CoMeT checkpoint.

        Args:
            folder: with config.json and model.safetensors (or its shards and their index).
            dtype: "float64", "float32", "float16" or "bfloat16"; None is the checkpoint's.
            device: of the library; None is its default.
            library: "cupy", "numpy", or a module of the Python array API standard.

        Raises:
            FileNotFoundError: a file is missing.
            ImportError: the library is not there, or has no GPU to run on; what to do is said.
            MemoryError: the weights do not fit on the device.
            ValueError: a file is cut short or foreign, or an argument does not fit.
        """
        if dtype is not None:
            check_choice("dtype", dtype, FLOATS)
        xp = import_library(library)
        try:
            xp.zeros(0, device=device)
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"device is {shown(device)}; expected one of {xp.__name__}'s that is there."
            ) from error
        config, weights = load_checkpoint(Path(folder), "np")

        def place(name: str, x: np.ndarray) -> Array:
            kind, most = dtype or dtype_name(x), float(np.abs(x).max())
            if np.isfinite(most) and most > float(ml_dtypes.finfo(kind).max):
                raise ValueError(
                    f"{name} holds {most:.4g}, more than {kind} can; take a wider dtype."
                )
            return xp.asarray(x, dtype=dtype_of(xp, kind), device=device)

        with _enough_memory("the weights: take a narrower dtype, or another device"):
            return cls(config, map_parameters(place, weights))

    @classmethod
    def from_model(cls, model: Any, *, library: str | Any = "cupy") -> CoMeTEngine:
        """The engine of a `CoMeTModel`, on the memory of its weights: nothing is copied.

        Args:
            model: on a device of the library. What changes its weights in place changes the
                engine's.
            library: as in `from_pretrained`.

        Raises:
            ImportError: as in `from_pretrained`.
            ValueError: the library cannot share the model's device or dtype.
        """
        xp = import_library(library)
        named = named_tensors(model.config, model.weights)
        try:
            tree = map_parameters(lambda name, _: xp.from_dlpack(named[name]), shapes(model.config))
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"the model is {model.dtype} on {model.device}, which {xp.__name__} cannot share "
                f"({error}); convert or move the model, or save it and use from_pretrained."
            ) from error
        return cls(model.config, tree)

    @_on_device
    def new_state(self, batch_size: int = 1) -> CoMeTState:
        """The state before any text.

        Args:
            batch_size: sequences to read side by side.

        Raises:
            ValueError: batch_size below 1.
        """
        check_count("batch_size", batch_size, 1, MOST_STREAMS)
        return new_state(self.config, self.weights["norm"], batch_size)

    @_on_device
    def close_chunk(self, state: CoMeTState, *, recorder: Recorder | None = None) -> CoMeTState:
        """End the open chunk by hand, so that what comes next starts a chunk of its own.

        Args:
            state: where the streams stand; it is not changed.
            recorder: what watches, see `fast.Recorder`.

        Raises:
            ValueError: the state belongs to another model.
        """
        check_state(state)
        check_watchers(recorder)
        state.check(self.config, state.batch_size, self.weights["norm"])
        return close_chunk(state, self.weights, self.config, recorder)

    @_on_device
    def __call__(
        self,
        ids: Array,
        *,
        lengths: Array | Sequence[int] | None = None,
        state: CoMeTState | None = None,
        logits: str = "all",
        chunk_sizes: Sequence[int] | None = None,
        recorder: Recorder | None = None,
    ) -> EngineOutput:
        """Read text: `CoMeTModel.forward` without labels.

        Args:
            ids: [b, n] or [n] integer token ids in [0, vocab_size), padded at the right.
            lengths: [b] tokens of each sequence, 1 to n; None is n for all.
            state: where the streams stand; None starts new ones. It is not changed.
            logits: "all", "last" (after each sequence's last token) or "none".
            chunk_sizes: sizes in tokens, adding up to n, of the chunks to cut this text into.
            recorder: what watches, see `fast.Recorder`.

        Raises:
            MemoryError: the device has too little; the state stands where it stood.
            ValueError: an argument does not fit; the message says which, and what would.
        """
        ids, sizes, state = check_call(self, ids, lengths, state, recorder)
        check_choice("logits", logits, ("all", "last", "none"))
        if chunk_sizes is not None:
            chunk_sizes = check_chunk_sizes(chunk_sizes, sizes, ids.shape[1])
        params, config = self.weights, self.config
        parts: list[Reading] = []
        last: Array | None = None
        for part in read(
            ids,
            state,
            params,
            config,
            chunk_sizes=chunk_sizes,
            lengths=sizes,
            outputs=logits,
            recorder=recorder,
        ):
            state = part.state
            if logits == "all":
                parts.append(part)
            elif logits == "last":
                last = part.last(last)
        found = None
        if logits == "all":
            found = predict(join(parts, ids.shape[1]), params, config)
        elif last is not None:
            found = predict(last[:, None, :], params, config)
        return EngineOutput(state, found)

    @_on_device
    def generate(
        self,
        ids: Array,
        state: CoMeTState | None = None,
        max_new_tokens: int = 128,
        stop_ids: Collection[int] = (),
        roll: bool = True,
        *,
        lengths: Array | Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: np.random.Generator | None = None,
        on_token: Callable[[list[int | None]], None] | None = None,
        recorder: Recorder | None = None,
    ) -> EngineGeneration:
        """Continue a text, in constant memory: the arguments are those of `CoMeTModel.generate`,
        with NumPy's generator.

        Raises:
            FloatingPointError: a stream has left its dtype's range.
            MemoryError: as in a call.
            ValueError: an argument does not fit; the message says which, and what would.
        """
        ids, sizes, state = check_call(self, ids, lengths, state, recorder)
        check_count("max_new_tokens", max_new_tokens, 0)
        stop_ids = check_stop_ids(stop_ids)
        check_flag("roll", roll)
        check_sampling(temperature, top_k, top_p)
        check_watchers(recorder, on_token)
        if generator is not None:
            wanted = "NumPy's, e.g. numpy.random.default_rng(0)"
            check_kind("generator", generator, np.random.Generator, wanted)
        params, config, b = self.weights, self.config, ids.shape[0]
        new: list[list[int]] = [[] for _ in range(b)]
        running = np.full(b, max_new_tokens > 0)
        last: Array | None = None
        prompt = read(ids, state, params, config, lengths=sizes, outputs="last", recorder=recorder)
        for part in prompt:
            last, state = part.last(last), part.state
        while running.any() and last is not None:
            logits = to_host(predict(last, params, config))  # [b, vocab]
            check_logits(logits.max(axis=-1))
            tokens = sample(logits, temperature, top_k, top_p, generator)
            step = [int(t) if run else None for t, run in zip(tokens, running, strict=True)]
            text = self.xp.asarray(tokens[:, None], dtype=self.xp.int64, device=self.device)
            take = running.astype(np.int64)
            more = read(
                text,
                state,
                params,
                config,
                roll=roll,
                lengths=take,
                outputs="last",
                recorder=recorder,
            )
            for part in more:
                last, state = part.last(last), part.state
            for row, token in enumerate(step):
                if token is not None:
                    new[row].append(token)
                    running[row] = token not in stop_ids and len(new[row]) < max_new_tokens
            if on_token is not None:
                on_token(step)
        return EngineGeneration(new, state)


def _check_home(name: str, x: Array, first: Array) -> None:
    """Raise ValueError unless an array is of another's library and on its device."""
    if not is_array_api_obj(x) or array_namespace(x) is not array_namespace(first):
        raise ValueError(
            f"the weight {name} is a {type(x).__module__}.{type(x).__name__}, where norm is a "
            f"{type(first).__module__}.{type(first).__name__}; give arrays of one library."
        )
    if device(x) != device(first):
        raise ValueError(
            f"the weight {name} is on {device(x)}, where norm is on {device(first)}; move all "
            "weights to one device."
        )
