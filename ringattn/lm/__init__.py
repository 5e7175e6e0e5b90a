"""Run mlx-lm's language models with their context spread over a ring (extra ``lm``).

    with ringattn.init() as ring:
        model, tokenizer = ringattn.lm.load("path")
        ringattn.lm.shard(model, ring)
        for response in ringattn.lm.stream_generate(model, tokenizer, prompt, max_tokens=100):
            ...

The weights are the same on every rank. Each rank holds a part of the keys and values and does a part of the prefill.
On a `ringattn.grid`, the ranks of a row share the weights.
"""

from ..errors import CacheFileError, ContextWarning, UnsupportedModelError, VersionWarning
from .generate import stream_generate
from .load import load
from .prompt_cache.store import load_cache, save_cache
from .shard import shard
from .sharding.sharded_cache import ShardedKVCache

__all__ = [
    "CacheFileError",
    "ContextWarning",
    "ShardedKVCache",
    "UnsupportedModelError",
    "VersionWarning",
    "load",
    "load_cache",
    "save_cache",
    "shard",
    "stream_generate",
]
