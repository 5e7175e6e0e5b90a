"""Exact attention over a sequence that is spread over several machines."""

from importlib import import_module as _import_module
from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from .native import sgemm as _sgemm

try:
    _sgemm.install()  # before MLX is loaded
    import mlx.core as _mx  # noqa: F401
except ImportError as _error:
    raise ImportError(
        f"ringattn needs MLX and it cannot be imported ({_error}); on Linux: pip install 'ringattn[cpu]'"
    ) from None

from .attention import attention
from .comm import init
from .comm.base import Ring
from .decode import decode_attention
from .errors import ArgumentError, ArgumentTypeError, RingAttentionError, RingError, TransformError
from .layout import Layout
from .merge import merge
from .ring import ring_attention

try:
    __version__ = _version("ringattn")
except _NotFound:  # run from a checkout that is not installed
    __version__ = "0"

if _TYPE_CHECKING:
    from . import lm as lm
    from . import training as training

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
    "Layout",
    "Ring",
    "RingAttentionError",
    "RingError",
    "TransformError",
    "attention",
    "decode_attention",
    "init",
    "merge",
    "ring_attention",
]
