"""A sharded model behind the OpenAI-compatible endpoints of mlx_lm.server.

A request takes this way: `listener` accepts the connection, `http` reads and answers it, `requests` checks its JSON
with the rules of `fields`, `prompts` makes its tokens, and `engine` generates on all ranks, one request after another.
`answers` splits the text into content, reasoning and tool calls, and `responses` gives it OpenAI's form. `stop_words`
and `cache_pool` run on every rank. `service` is what all connections share.
"""

from .engine import Engine
from .http import open_server
from .service import Settings

__all__ = ["Engine", "Settings", "open_server"]
