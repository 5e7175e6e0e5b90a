"""What can be wrong with a model or a cache file."""

from __future__ import annotations

from ..errors import RingAttentionError


class UnsupportedModelError(RingAttentionError, ValueError):
    """A layer or cache of a model cannot be spread over a ring; the message names it."""


class CacheFileError(RingAttentionError, ValueError):
    """A file of a saved prompt cache is missing, torn or another model's; the message names it."""
