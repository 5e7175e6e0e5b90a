"""What can be wrong with a model or a cache file."""

from __future__ import annotations

from ..errors import ArgumentError


class UnsupportedModelError(ArgumentError):
    """A layer or cache of a model cannot be spread over a ring; the message names it."""


class ContextWarning(UserWarning):
    """A prompt is longer than the context that the model was made for; the message names both lengths."""


class CacheFileError(ArgumentError):
    """A file of a saved prompt cache is missing, torn or another model's; the message names it."""
