"""A sharded model behind the OpenAI-compatible endpoints of mlx_lm.server.

`http` is mlx-lm's own handler with stricter manners, `engine` gives its answers on all ranks, one request after the
other, and `kept` remembers the caches of earlier conversations.
"""

from .engine import Engine
from .http import open_server

__all__ = ["Engine", "open_server"]
