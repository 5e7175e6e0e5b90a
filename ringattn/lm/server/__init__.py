"""A server with the OpenAI-compatible endpoints of mlx_lm.server, for a sharded model.

A request passes through these modules: `listener` accepts the connection, `http` reads and answers it, `api.requests`
checks its JSON by the rules of `api.fields`, `api.prompts` makes its tokens, and `engine` generates on all ranks, one
request after another. `api.answers` splits the text into content, reasoning and tool calls, and `api.responses` gives
it OpenAI's form. `stop_words` and `cache_pool` run on every rank. All connections share one `service`.
"""

from .engine import Engine
from .http import check_address, open_server
from .service import Settings

__all__ = ["Engine", "Settings", "check_address", "open_server"]
