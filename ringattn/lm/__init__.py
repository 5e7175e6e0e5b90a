"""mlx-lm's language models with their context spread over a ring (extra ``lm``).

    with ringattn.init() as ring:
        model, tokenizer = ringattn.lm.load("path")
        ringattn.lm.shard(model, ring)
        for response in ringattn.lm.stream_generate(model, tokenizer, prompt, max_tokens=100):
            ...

The weights are the same on every rank; each holds a part of the keys and values and shares in the prefill.
"""

from .cache import ShardedKVCache
from .errors import CacheFileError, ContextWarning, UnsupportedModelError
from .files import load_cache, save_cache
from .generate import stream_generate
from .load import load
from .model import shard

__all__ = [
    "CacheFileError",
    "ContextWarning",
    "ShardedKVCache",
    "UnsupportedModelError",
    "load",
    "load_cache",
    "save_cache",
    "shard",
    "stream_generate",
]
