"""The exceptions and warnings of ringattn."""

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
    """Base class of all exceptions that ringattn raises on purpose."""


class ArgumentError(RingAttentionError, ValueError):
    """Wrong argument. The message names it, the given value and the expectation.

    A collective call raises it on every rank, before any data moves. The ring still works afterwards.
    """


class ArgumentTypeError(ArgumentError, TypeError):
    """Argument of a wrong type. Also a ``ValueError``, so that one ``except`` catches both."""


class RingError(RingAttentionError, RuntimeError):
    """Broken ring: a rank died, stalled, left, or raised an error of its own. The ring cannot be used again.

    Attributes:
        rank: The rank that caused it, or ``None`` where it is unknown.
        host: The host name of that rank, or ``None``.
        hop: The last reported hop of that rank, or ``None``.
    """

    def __init__(self, message: str, *, rank: int | None = None, host: str | None = None, hop: int | None = None):
        super().__init__(message)
        self.rank = rank
        self.host = host
        self.hop = hop


class TransformError(RingAttentionError, NotImplementedError):
    """Unsupported function transformation (grad, jvp, vmap, compile)."""


class MissingExtraError(RingAttentionError):
    """Missing optional package. The message says how to install it."""


class KernelWarning(UserWarning):
    """Kernel that does not work on this system. A slower one replaces it, and results stay right."""


class UnsupportedModelError(ArgumentError):
    """Layer or cache of a model that cannot be spread over a ring. The message names it."""


class ContextWarning(UserWarning):
    """Prompt that is longer than the context of the model. The message names both lengths."""


class VersionWarning(UserWarning):
    """The installed version of a library was not tested with this package; the message says which versions were."""


class CacheFileError(ArgumentError):
    """File of a saved prompt cache that is missing, damaged or of another model. The message names it."""


class LaunchError(RingAttentionError):
    """Program that cannot be launched. `exit_code` is that of a shell: 127 not found, 126 not executable."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code
