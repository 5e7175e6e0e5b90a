"""The parts of a sharded model: its caches, its attention, and the rules that give each rank its tokens.

`partition` decides with integers which rank computes and keeps which tokens. `sharded_cache` keeps keys and values by
it, and `history` the tokens' ids. `attention` attends over such caches in place of mlx-lm's function, and
`layer_adapters` in place of layers that call no such function. `ropes` finds position embeddings that give other
numbers when a prompt is cut into chunks. `weights` divides a model's weights among the ranks of a row.
"""
