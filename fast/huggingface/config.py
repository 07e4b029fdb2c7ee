"""A model's config as transformers keeps it: `CoMeTConfig` in config.json, under the type "comet"."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from reference.config import BackboneConfig, CoMeTConfig, MemoryConfig

__all__ = ["CoMeTPretrainedConfig"]

SECTIONS = {"backbone": BackboneConfig, "memory": MemoryConfig}
FIELDS = {
    field.name: section for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)
}
"""Which section of the config a field is in. No two fields share a name."""


class CoMeTPretrainedConfig(PreTrainedConfig):
    """A `CoMeTConfig`, and what transformers adds to every config.

    Its sections are dicts, and a field of theirs is an attribute too, to be read and set:
    `config.vocab_size` is `config.backbone["vocab_size"]`.

    Args:
        backbone, memory: the fields of `BackboneConfig` and `MemoryConfig`, as dicts or as such
            configs. `backbone` must be given; `memory` has defaults.
        use_cache: whether `forward` returns a `CoMeTCache` where it is not told.
        bos_token_id, eos_token_id, pad_token_id: of the tokenizer.

    Raises:
        ValueError: a section or field is missing, unknown, or has a bad value.
    """

    model_type: ClassVar[str] = "comet"
    has_no_defaults_at_init: ClassVar[bool] = True
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    backbone: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.memory is None:
            self.memory = {}
        for section, kind in SECTIONS.items():
            value = getattr(self, section)
            if isinstance(value, kind):
                object.__setattr__(self, section, vars(value).copy())
        if self.backbone is None:
            raise ValueError(
                "backbone is missing; give a BackboneConfig, or make the config of a model's by "
                "CoMeTPretrainedConfig.from_comet(config)."
            )
        whole = self.to_comet().to_dict()  # every field, checked
        for section in SECTIONS:
            object.__setattr__(self, section, whole[section])
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """The config of a config.json, as transformers reads it.

        Raises:
            ValueError: it is that of a `CoMeTModel`, whose weights have other names; or a section or
                field is missing, unknown, or has a bad value.
        """
        if "model_type" not in config_dict:
            raise ValueError(
                "config.json has no model_type, as that of a CoMeTModel; load the folder by "
                "CoMeTForCausalLM.from_model(CoMeTModel.from_pretrained(folder))."
            )
        return super().from_dict(config_dict, **options)

    @classmethod
    def from_comet(cls, config: CoMeTConfig, **options: Any) -> CoMeTPretrainedConfig:
        """The config of a `CoMeTModel`.

        Args:
            config: `model.config`.
            options: other fields of the config, such as eos_token_id.
        """
        return cls(**config.to_dict(), **options)

    def to_comet(self) -> CoMeTConfig:
        """The config for a `CoMeTModel`.

        Raises:
            ValueError: a field is missing, unknown, or has a bad value.
        """
        return CoMeTConfig.from_dict({section: getattr(self, section) for section in SECTIONS})

    def __getattr__(self, name: str) -> Any:
        section = vars(self).get(FIELDS.get(name, ""))
        if not isinstance(section, dict) or name not in section:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return section[name]

    def __setattr__(self, name: str, value: Any) -> None:
        section = vars(self).get(FIELDS.get(name, ""))
        if isinstance(section, dict):
            section[name] = value
        else:
            super().__setattr__(name, value)
