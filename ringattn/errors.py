"""The exceptions a user can catch."""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "KernelWarning",
    "MissingExtraError",
    "RingAttentionError",
    "RingError",
    "TransformError",
]


class RingAttentionError(Exception):
    """The base of every exception that ringattn raises on purpose."""


class ArgumentError(RingAttentionError, ValueError):
    """An argument is wrong; the message names it, what was given and what was expected.

    In a collective call it is raised on every rank, before any data moves, and the ring still works afterwards.
    """


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument is of the wrong type (also a ``ValueError``, so one ``except`` catches both)."""


class RingError(RingAttentionError, RuntimeError):
    """A ring broke: a rank died, stalled, left, or ran into an error of its own. The ring cannot be used again.

    Attributes:
        rank: The rank that caused it, or ``None`` where that is not known.
        host: Its host name, or ``None``.
        hop: The hop it was in when last heard of, or ``None``.
    """

    def __init__(self, message: str, *, rank: int | None = None, host: str | None = None, hop: int | None = None):
        super().__init__(message)
        self.rank, self.host, self.hop = rank, host, hop


class TransformError(RingAttentionError, NotImplementedError):
    """A function transformation (grad, jvp, vmap, compile) was asked for where it is not supported."""


class MissingExtraError(RingAttentionError):
    """An optional package is not installed; the message says how to install it."""


class KernelWarning(UserWarning):
    """A kernel does not work on this system and a slower one takes its place; the results stay right."""


class UnsupportedModelError(ArgumentError):
    """A layer or cache of a model cannot be spread over a ring; the message names it."""


class ContextWarning(UserWarning):
    """A prompt is longer than the context that the model was made for; the message names both lengths."""


class VersionWarning(UserWarning):
    """The installed version of a library was not tested with this package; the message says which versions were."""


class CacheFileError(ArgumentError):
    """A file of a saved prompt cache is missing, torn or another model's; the message names it."""


class LaunchError(RingAttentionError):
    """The program cannot be launched. `exit_code` is what a shell would give: 127 not found, 126 not runnable."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code
