"""Checkpoints that others have trained and named."""

from .published import (
    LAYER_NAMES,
    TOP_NAMES,
    PublishedIds,
    load_published,
    published_name,
    save_published,
)

__all__ = [
    "LAYER_NAMES",
    "TOP_NAMES",
    "PublishedIds",
    "load_published",
    "published_name",
    "save_published",
]
