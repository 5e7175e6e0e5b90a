"""The parts of a sharded model: its caches, its attention, and the rules that give each rank its tokens.

`partition` decides with integers which rank computes and keeps which tokens. `forward_pass` has what all caches share:
`sharded_cache` keeps keys and values, `chunked_cache` those of chunks, `recurrent_cache` states, and `history` the
tokens' ids; `cache_kinds` makes them. `attention` attends over such caches in place of mlx-lm's function.
`layer_adapters` knows the attention layers that need more: `latent` and `sparse` give a layer something in the place of
its cache. `patch_points` lists what recurrent layers call: `recurrences`, `elementwise_recurrences` and
`short_convolution` run these over the ring, for the layer that `running_layer` finds. `trial` shows before the first
token whether a model can be sharded, and `ropes` finds position embeddings that give other numbers when a prompt is cut
into chunks. `weights` divides a model's weights among the ranks of a row.
"""
