"""Decays between the tokens of a chunk, and products of queries and keys that decay from one to the other.

The decay from token j to token i is the product of the decays of the tokens j+1 to i. A quotient of two products from
the chunk's start would lose digits and overflow where a token forgets all. Here a chunk is halved again and again: a
pair with its tokens in different halves decays from j to the end of the first half, and from there to i. Both factors
are products of numbers of at most 1, so nothing overflows, and a strong decay affects only the pairs that span it.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Decays(NamedTuple):
    """Decays of the tokens of a chunk, each ``[..., C, 1]`` or ``[..., C, Dk]``."""

    from_start: mx.array  # from the state before the chunk to each token, its own decay included
    to_end: mx.array  # from each token to the state after the chunk, its own decay excluded

    @property
    def whole(self) -> mx.array:
        """The decay of the whole chunk ``[..., 1, 1 or Dk]``."""
        return self.from_start[..., -1:, :]


def triangle(first: mx.array, lower: mx.array, last: mx.array) -> mx.array:
    """Join the blocks of a lower triangular matrix. `first` and `last` broadcast to the shape of `lower`."""
    first, last = mx.broadcast_to(first, lower.shape), mx.broadcast_to(last, lower.shape)
    zeros = mx.zeros_like(lower)
    return mx.concatenate([mx.concatenate([first, zeros], -1), mx.concatenate([lower, last], -1)], -2)


def decayed_products(x: mx.array, k: mx.array, decay: mx.array) -> tuple[mx.array, Decays]:
    """Multiply ``x_i . (decay from j to i) k_j`` for the pairs with ``j <= i``. The other products are 0.

    Args:
        x: Rows ``[..., C, D]``, float32; C is a power of two. Leading axes broadcast.
        k: Keys ``[..., C, D]``.
        decay: Decays of the tokens ``[..., C, D]``, from 0 to 1.

    Returns:
        Products ``[..., C, C]``, and the decays of the chunk.
    """
    products = (x * k).sum(-1)[..., None, None]  # [..., blocks, size, size]: at first a token is a block
    blocks = Decays(decay[..., None, :], mx.ones_like(decay)[..., None, :])  # [..., blocks, size, D]
    for level in range(decay.shape[-2].bit_length() - 1):
        pairs = Decays(*(mx.unflatten(y, -3, (-1, 2)) for y in blocks))
        rows, keys = (mx.unflatten(y, -2, (-1, 2, 1 << level)) for y in (x, k))
        later = rows[..., 1, :, :] * pairs.from_start[..., 1, :, :]
        earlier = keys[..., 0, :, :] * pairs.to_end[..., 0, :, :]
        own = mx.unflatten(products, -3, (-1, 2))
        products = triangle(own[..., 0, :, :], _outer(later, earlier), own[..., 1, :, :])
        blocks = _joined(pairs)
    return products[..., 0, :, :], Decays(*(y[..., 0, :, :] for y in blocks))


def _joined(pairs: Decays) -> Decays:
    """Decays of the joined blocks ``[..., pairs, 2 * size, D]``."""
    whole = pairs.whole
    one = mx.ones_like(whole[..., :1, :, :])
    from_start = pairs.from_start * mx.concatenate([one, whole[..., :1, :, :]], -3)
    to_end = pairs.to_end * mx.concatenate([whole[..., 1:, :, :], one], -3)
    return Decays(mx.flatten(from_start, -3, -2), mx.flatten(to_end, -3, -2))


def _outer(x: mx.array, y: mx.array) -> mx.array:
    """Multiply ``x y^T``. For one channel, products of numbers are faster than thousands of small matrix products."""
    y = y.swapaxes(-1, -2)
    return x * y if x.shape[-1] == 1 else x @ y
