"""Exact attention over a sequence that is spread over several machines."""

from .native import sgemm as _sgemm

try:
    _sgemm.install()  # before MLX is loaded
    import mlx.core as _mx  # noqa: F401
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
from .ring_attention import ring_attention
from .transport import init
from .transport.base import Ring

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
