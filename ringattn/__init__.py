"""Exact attention over a sequence that is spread over several machines."""

from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version

from .native import sgemm as _sgemm

try:
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

_sgemm.install()

try:
    __version__ = _version("ringattn")
except _NotFound:  # run from a checkout that is not installed
    __version__ = "0"

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
