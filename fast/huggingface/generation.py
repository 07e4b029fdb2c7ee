"""What `generate` of transformers has to know of streams: their cache, and how a prompt goes on."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor
from transformers import GenerationMixin

from ..arrays import shown
from ..inputs import check_kind
from .cache import CoMeTCache

__all__ = ["FOREIGN", "StreamGenerationMixin"]

ONLY = "a stream's memories are its cache"
FOREIGN = f"a CoMeTCache, such as out.cache: {ONLY}"
"""What a cache of another kind is told."""


class StreamGenerationMixin(GenerationMixin):
    """`generate`, with a `CoMeTCache` for its cache."""

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Put a cache of ours into `generate`'s arguments, as many streams as it decodes.

        Raises:
            ValueError: a cache of another kind is asked for.
        """
        kind, cache = generation_config.cache_implementation, model_kwargs.get("cache")
        if kind is not None:
            raise ValueError(f"cache_implementation is {shown(kind)}; expected None: {ONLY}.")
        if cache is None:
            if generation_config.use_cache is not False:
                model_kwargs["cache"] = CoMeTCache()
            return
        check_kind("cache", cache, CoMeTCache, FOREIGN)
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if copies > 1 and cache.batch_size == batch_size:
            cache = copy.copy(cache)
            cache.batch_repeat_interleave(copies)
            model_kwargs["cache"] = cache
        cache._is_user_defined = True

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Read the prompt, once it is known to go on from where the cache stands.

        `generate` takes ids without a longer mask for the whole text, and cuts off what the cache
        has read: other ids would be cut in silence.
        """
        cache, mask = model_kwargs.get("cache"), model_kwargs.get("attention_mask")
        past, n = 0 if cache is None else cache.columns, input_ids.shape[1]
        if model_kwargs.get("inputs_embeds") is None:
            # a mask of ones has been dropped by now
            width = generation_config._mask_length if mask is None else mask.shape[1]
            if width not in (n, past + n):
                raise ValueError(
                    f"attention_mask has {width} columns, input_ids {n} and the cache {past}; "
                    f"expected a mask of {n} or of {past + n}."
                )
            if cache is not None and past and width == n:
                cache.check_continues(input_ids)
        return cast(Any, super())._prefill(
            input_ids, generation_config, model_kwargs, is_first_iteration
        )
