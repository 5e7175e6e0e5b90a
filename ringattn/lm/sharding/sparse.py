"""Sparse attention with an indexer (DeepSeek-V3.2, arXiv 2512.02556) over a sharded cache.

The indexer scores all earlier tokens for a query, and the query attends to the `index_topk` best. A rank holds the
indexer's keys of its own tokens, as their latent vectors. The choice is that of one process, whatever the number of
ranks: of equal scores the later token wins, which is what mlx-lm's `mx.argpartition` does on a CPU. After the first
layer, inputs differ by rounding between numbers of ranks, as they do between mlx-lm's own chunks: two tokens whose
scores differ by a few units in the last place may then change places.

- Many tokens: the indexer's keys of all ranks are gathered, ``context * index_head_dim`` values for each layer and
  round, since a query of the indexer is `index_n_heads` times as large as a key. Scores are computed for a block of
  queries at a time. The choice of a rank's queries is one byte for each of them and each token of the context.
- Few tokens, on every rank: each rank takes the best of its own tokens, and they exchange these candidates, at most
  ``8 * index_topk`` bytes for each rank and query.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ...core.intervals import positions
from ...decode_attention import decode_attention
from ...layout import Layout
from ...ring_attention import ring_attention
from .attention import split_heads
from .forward_pass import current
from .latent import LatentView
from .sharded_cache import CausalMask

SCORES = 1 << 22  # scores of one block of queries


class SparseView(LatentView):
    """The caches of a sparse layer during one call of it: those of the latent vectors and of the indexer's keys."""

    def __init__(self, caches: Any, mask: CausalMask | None):
        super().__init__(caches[0], mask)
        self.index_cache = caches[1]
        self.values: Any = mx.zeros(0)
        self._chosen: Candidates | mx.array | None = None

    def __getitem__(self, index: int) -> SparseView:
        return self

    def choose(self, indexer: Any, x: mx.array, q_latent: mx.array) -> None:
        """Choose the tokens to attend to, by the layer's indexer. Collective.

        Args:
            indexer: `mlx_lm.models.deepseek_v32.Indexer`.
            x: The layer's input ``[batch, tokens, hidden]``.
            q_latent: The latent vectors of its queries ``[batch, tokens, rank]``.
        """
        q = split_heads(indexer.wq_b(q_latent), indexer.n_heads)
        q = indexer.rope(q, offset=self.offset)
        k = indexer.rope(indexer.k_norm(indexer.wk(x))[:, None], offset=self.offset)
        weights = indexer.weights_proj(x) * (indexer.n_heads**-0.5 * indexer.softmax_scale)
        held, _ = self.index_cache.update_and_fetch(k, mx.zeros((*k.shape[:-1], 0), k.dtype))
        if self.index_cache.in_trial() or self.index_cache.size() <= indexer.index_topk or not current.needs_output():
            return
        score = Scores(q, weights.swapaxes(-1, -2)[..., None])
        step = self.cache.step
        assert step is not None
        layout, ring = self.index_cache.layout, self.index_cache.ring
        if step.shared:
            keys = layout.gather(held, ring)
            self._chosen = _chosen_in_blocks(score, keys, self.offset, indexer.index_topk)
        else:
            own = mx.array(positions(layout.spans[ring.rank]))
            self._chosen = Candidates(score(held, own, self.offset), own, indexer.index_topk, layout, ring)

    def run(self, q: mx.array, k: mx.array, scale: float, sinks: Any) -> mx.array:
        """Attend to the chosen tokens."""
        # Nothing else evaluates these in each call, and what is not evaluated keeps all that it is made from.
        self.latents = mx.depends(
            self.latents, [x for x in (self.index_cache.keys, self.index_cache.values) if x is not None]
        )
        chosen = self._chosen
        if chosen is None:
            return super().run(q, k, scale, sinks)
        step, layout = self.cache.step, self.cache.layout
        assert step is not None
        dtype = mx.result_type(q, k)
        q, k, v = (x.astype(dtype) for x in (q, k, self.latents))
        options: dict[str, Any] = {"ring": self.cache.ring, "scale": scale, "sinks": sinks}
        before = (layout.stop, 0)  # a window that is causal
        if isinstance(chosen, mx.array):
            return ring_attention(q, k, v, layout=step.new, kv_layout=layout, mask=chosen, window=before, **options)
        if q.shape[2] == 1:
            k, v = (chosen.pick(x) for x in (k, v))
            return decode_attention(q, k, v, kv_layout=chosen.layout, mask=chosen.chosen, **options)
        mask = chosen.mask(layout)
        return decode_attention(q, k, v, kv_layout=layout, start=step.new.start, mask=mask, window=before, **options)


class Scores:
    """The indexer's scores of queries: the sum over heads of ``weight * max(q . k, 0)``, in the queries' dtype.

    Args:
        q: ``[batch, heads, tokens, head_dim]``.
        weights: ``[batch, heads, tokens, 1]``.
    """

    def __init__(self, q: mx.array, weights: mx.array):
        self.q = q
        self.weights = weights

    def __call__(self, k: mx.array, k_pos: mx.array, start: int, rows: slice = slice(None)) -> mx.array:
        """The scores of the queries `rows` with keys ``[batch, 1, keys, head_dim]``; -inf for later keys.

        As in mlx-lm, heads are added one by one for several tokens, and at once for one: sums round in its order.
        """
        q, weights = self.q[:, :, rows], self.weights[:, :, rows]
        if self.q.shape[2] == 1:
            scores = (mx.maximum(q @ k.swapaxes(-1, -2), 0) * weights).sum(axis=1, keepdims=True)
        else:
            heads = (slice(h, h + 1) for h in range(q.shape[1]))
            parts = (mx.maximum(q[:, h] @ k.swapaxes(-1, -2), 0) * weights[:, h] for h in heads)
            scores = sum(parts, mx.array(0, q.dtype))
        q_pos = mx.arange(start, start + self.q.shape[2])[rows, None]
        return mx.where(k_pos <= q_pos, mx.where(mx.isnan(scores), mx.inf, scores), -mx.inf)


class Candidates:
    """The best of each rank's tokens for every query, and which of them are the best of all. Collective.

    Args:
        scores: The scores of this rank's tokens ``[batch, 1, queries, tokens held]``.
        own: Their positions.
        count: The number of tokens to choose.
        layout: The tokens of all ranks.
        ring: The ring.

    Attributes:
        layout: The candidates of each rank, one after the other.
        indices: This rank's candidates among its tokens, ascending: ``[batch, 1, queries, candidates]``.
        chosen: Which candidates of all ranks are chosen: ``[batch, 1, queries, candidates of all ranks]``.
    """

    def __init__(self, scores: mx.array, own: mx.array, count: int, layout: Layout, ring: Any):
        counts = [min(count, layout.local_length(rank)) for rank in range(ring.size)]
        self.layout = _one_after_another(counts)
        self.held = scores.shape[-1]
        self.rank = ring.rank
        if counts[ring.rank]:
            best = mx.where(choose(scores, counts[ring.rank]), mx.arange(self.held), self.held)
            self.indices = mx.sort(best, axis=-1)[..., : counts[ring.rank]]
            values = mx.take_along_axis(scores, self.indices, axis=-1)
        else:
            self.indices = mx.zeros((*scores.shape[:-1], 0), mx.int32)
            values = scores
        places = own[self.indices] if self.held else self.indices
        pairs = mx.stack([values.astype(mx.float32).view(mx.int32), places.astype(mx.int32)])
        bits, places = self.layout.gather(pairs, ring, axis=4)
        order = mx.argsort(places, axis=-1)
        ordered = mx.take_along_axis(mx.contiguous(bits).view(mx.float32), order, axis=-1)
        self.chosen = mx.take_along_axis(choose(ordered, count), mx.argsort(order, axis=-1), axis=-1)

    def pick(self, x: mx.array) -> mx.array:
        """The candidates of one query among this rank's tokens: ``[batch, 1, candidates, dim]``."""
        index = self.indices[:, :, 0, :, None]
        return mx.take_along_axis(x, mx.broadcast_to(index, (*index.shape[:-1], x.shape[-1])), axis=2)

    def mask(self, layout: Layout) -> mx.array:
        """Whether a query attends to a token, for all tokens in order; only this rank's columns are right."""
        ((start, stop),) = self.layout.spans[self.rank] or ((0, 0),)
        whole = mx.zeros((*self.chosen.shape[:-1], layout.length), mx.bool_)
        if start == stop:
            return whole
        columns = mx.array(positions(layout.spans[self.rank]) - layout.start)[self.indices]
        return mx.put_along_axis(whole, columns, self.chosen[..., start:stop], axis=-1)


def choose(scores: mx.array, count: int) -> mx.array:
    """Whether each of the last axis is among the `count` greatest; of equal ones the last are."""
    if count >= scores.shape[-1]:
        return mx.ones(scores.shape, mx.bool_)
    least = mx.partition(scores, -count, axis=-1)[..., -count, None]
    above, equal = scores > least, scores == least
    wanted = count - above.sum(axis=-1, keepdims=True)
    return above | (equal & (mx.cumsum(equal.astype(mx.int32), axis=-1, reverse=True) <= wanted))


def _chosen_in_blocks(score: Scores, keys: mx.array, start: int, count: int) -> mx.array:
    """Whether each query attends to each token of the context: ``[batch, 1, queries, tokens]``, boolean."""
    queries = score.q.shape[2]
    size = max(1, SCORES // keys.shape[2])
    blocks = []
    for first in range(0, queries, size):
        rows = slice(first, min(first + size, queries))
        seen = keys[:, :, : start + rows.stop]
        chosen = choose(score(seen, mx.arange(seen.shape[2]), start, rows), count)
        blocks.append(_padded(chosen, keys.shape[2]))
        mx.eval(blocks[-1])  # no more than the scores of one block in memory
    return mx.concatenate(blocks, axis=2)


def _padded(mask: mx.array, columns: int) -> mx.array:
    return mx.pad(mask, [(0, 0)] * 3 + [(0, columns - mask.shape[-1])])


def _one_after_another(counts: list[int]) -> Layout:
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return Layout(tuple(((end - count, end),) for count, end in zip(counts, ends)), 0)


def choosing(plain: Callable) -> Callable:
    """The `__call__` of an indexer, `plain`, with calls from an adapted layer passed to its `SparseView`."""

    def call(indexer: Any, x: mx.array, qr: mx.array, mask: Any, cache: Any = None) -> mx.array | None:
        if isinstance(cache, SparseView):
            cache.choose(indexer, x, qr)
            return None
        found: mx.array | None = plain(indexer, x, qr, mask, cache)
        return found

    return call
