"""CoMeT as a model of Hugging Face's transformers: `generate`, `Trainer`, `AutoModelForCausalLM`.

    import fast.huggingface  # tells transformers of the type "comet"

`CoMeTForCausalLM` stands around a `CoMeTModel` and computes nothing of its own; `CoMeTCache` holds
the stream's state. Nothing else of `fast` imports transformers.
"""

from __future__ import annotations

try:
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as error:
    raise ImportError(
        'fast.huggingface needs transformers; run pip install "comet-memory[huggingface]" first.'
    ) from error

from .cache import CoMeTCache
from .config import CoMeTPretrainedConfig
from .model import CoMeTForCausalLM

__all__ = ["CoMeTCache", "CoMeTForCausalLM", "CoMeTPretrainedConfig"]

AutoConfig.register(CoMeTPretrainedConfig.model_type, CoMeTPretrainedConfig)
AutoModelForCausalLM.register(CoMeTPretrainedConfig, CoMeTForCausalLM)
