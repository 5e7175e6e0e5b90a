"""The local attention kernels, one module each, with one signature.

    forward(q, k, v, q_pos, k_pos, rules, state) -> state

q ``[B, Hq, Lq, D]``, k ``[B, Hkv, Lk, D]`` and v ``[B, Hkv, Lk, Dv]`` share one dtype; `q_pos` and `k_pos` are
ascending int32 positions; `state` is what earlier keys left, or ``None``, and is used up: the kernel may write into it.

    finished(q, k, v, q_pos, k_pos, rules, sinks, dtype, with_lse) -> (out, lse)

ends in `out` in `dtype` and, where it is wanted, the lse, else ``None``; `sinks` ``[Hq]`` or ``None``.

    rows(out, lse, dout, dlse) -> rows
    backward(q, k, v, q_pos, k_pos, rules, rows, sums) -> sums

are the gradient (see `ringattn.core.gradients`): `rows` is what it needs of each query row, from results and the
gradients of the loss by them; `backward` adds the gradients of this block of queries and keys to `sums`, which are
used up.
"""
