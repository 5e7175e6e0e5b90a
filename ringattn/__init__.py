"""Exact attention over a sequence that is spread over several machines."""

from importlib import import_module as _import_module
from typing import Any as _Any

from .native import sgemm as _sgemm
from .native import tf32 as _tf32

try:
    _late = _tf32.disable()
    import mlx.core as _mx  # noqa: F401

    if _late:
        _tf32.check()
except ImportError as _error:
    raise ImportError(
        f"ringattn needs MLX and it cannot be imported ({_error}); on Linux: pip install 'ringattn[cpu]'"
    ) from None

from ._version import __version__ as __version__
from .attention import attention
from .core.online_softmax import merge
from .decode_attention import decode_attention
from .errors import ArgumentError, ArgumentTypeError, RingAttentionError, RingError, TransformError
from .layout import Layout
from .linear_attention import linear_attention
from .ring_attention import ring_attention
from .ring_linear_attention import ring_linear_attention
from .ring_short_conv import ring_short_conv
from .rope import rope
from .transport import init
from .transport.base import Ring
from .transport.grid import Grid, grid

_sgemm.install()

_SUBPACKAGES = ("lm", "training")  # imported at their first use: not every program needs them


def __getattr__(name: str) -> _Any:
    if name in _SUBPACKAGES:
        return _import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES})


__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "Grid",
    "Layout",
    "Ring",
    "RingAttentionError",
    "RingError",
    "TransformError",
    "attention",
    "decode_attention",
    "grid",
    "init",
    "linear_attention",
    "merge",
    "ring_attention",
    "ring_linear_attention",
    "ring_short_conv",
    "rope",
]
