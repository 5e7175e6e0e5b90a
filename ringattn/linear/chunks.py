"""Chunks of tokens as affine maps of the state.

With the state S ``[Dv, Dk]`` before a chunk, the state after it is ``S A + B`` (see `ringattn.core.affine`). In the
delta rule the tokens of a chunk add ``u_t k_t^T``, decayed to the chunk's end, where u solves

    u_t = beta_t (v_t - S (decay to t) k_t - sum_{j<t} u_j (k_j . (decay from j to t) k_t))

a unit lower triangular system: the WY form (arXiv 2406.06484; with decays arXiv 2412.06464, section 3; with a decay per
channel arXiv 2510.26692). Without beta, u is v.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from .decays import Decays, decayed_products
from .triangular import unit_inverse


class Tokens(NamedTuple):
    """Tokens of a recurrence in float32. Leading axes broadcast.

    Attributes:
        q: Queries ``[..., C, Dk]``, scaled.
        k: Keys ``[..., C, Dk]``.
        v: Values ``[..., C, Dv]``.
        decay: Decays ``[..., C, 1]`` or ``[..., C, Dk]``, from 0 to 1.
        beta: Strengths of the delta rule ``[..., C, 1]``; ``None`` without it.
    """

    q: mx.array
    k: mx.array
    v: mx.array
    decay: mx.array
    beta: mx.array | None


class Chunks(NamedTuple):
    """Maps of the state over chunks, and their outputs ``out + reads S^T``.

    Attributes:
        transition: Matrices ``[..., Dk, Dk]`` with beta, decays ``[..., 1, 1 or Dk]`` without.
        offset: States after the chunks from a state of zeros ``[..., Dv, Dk]``.
        out: Outputs from a state of zeros ``[..., C, Dv]``.
        reads: ``[..., C, Dk]``.
    """

    transition: mx.array
    offset: mx.array
    out: mx.array
    reads: mx.array


def compute_chunks(tokens: Tokens) -> Chunks:
    """Compute the maps and outputs of chunks of tokens."""
    q, k, v, decay, beta = tokens
    products, decays = _products(mx.stack([q] if beta is None else [q, k]), k, decay)
    late = k * decays.to_end
    reads = q * decays.from_start
    if beta is None:
        return Chunks(decays.whole, _transposed(v) @ late, products[0] @ v, reads)
    earlier = mx.tril(mx.ones(products.shape[-2:]), -1)
    solve = unit_inverse(products[1] * earlier * beta) * _transposed(beta)
    u = solve @ v
    w = solve @ (k * decays.from_start)
    transition = mx.eye(k.shape[-1]) * decays.whole - _transposed(w) @ late
    return Chunks(transition, _transposed(u) @ late, products[0] @ u, reads - products[0] @ w)


def _products(rows: mx.array, k: mx.array, decay: mx.array) -> tuple[mx.array, Decays]:
    """Multiply rows and keys with the decays between them. One decay for all channels is a factor of the product."""
    if decay.shape[-1] > 1:
        return decayed_products(rows, k, decay)
    one = mx.ones((decay.shape[-2], 1))
    factors, decays = decayed_products(one, one, decay)
    return (rows @ _transposed(k)) * factors, decays


def _transposed(x: mx.array) -> mx.array:
    return x.swapaxes(-1, -2)
