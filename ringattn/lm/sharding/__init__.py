"""The parts of a sharded model: its caches, its attention, and the rules that give each rank its tokens.

`partition` decides with integers which rank computes and keeps which tokens. `sharded_cache` keeps keys and values by
it, and `history` the tokens' ids; `chunked_cache` and `cache_list` are caches of other layers. `attention` attends over
such caches in place of mlx-lm's function. `layer_adapters` knows the layers that need more: `latent` and `sparse` give
a layer something in the place of its cache. `trial` shows before the first token whether a model can be sharded, and
`ropes` finds position embeddings that give other numbers when a prompt is cut into chunks.
"""
