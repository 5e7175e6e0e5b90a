"""Prefill in a pipeline, as in exo: chunks of the prompt stream through the stages, and all stages work at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache


class Pipeline:
    """The stage of this rank: an equal share of the layers, in the order of the ranks.

    The other layers are removed from the model. Sends and receives have streams of their own, so that they overlap the
    layers' work.
    """

    def __init__(self, model: nn.Module, group: mx.distributed.Group):
        rank, size = group.rank(), group.size()
        count = len(model.model.layers)
        model.model.layers = model.model.layers[count * rank // size : count * (rank + 1) // size]
        self._model = model
        self._group = group
        self._rank = rank
        self._last = rank == size - 1
        self._sending = mx.new_stream(mx.cpu)
        self._receiving = mx.new_stream(mx.cpu)

    def generate(self, ids: mx.array, new: int, step: int) -> Iterator[tuple[int, mx.array]]:
        """Likeliest tokens after a prompt, with the log-probabilities; the latter on the last rank alone.

        Args:
            ids: Prompt, ``[tokens]``.
            new: Number of new tokens.
            step: Tokens of a chunk.
        """
        cache = [KVCache() for _ in self._model.model.layers]
        read = ids[:-1]
        self._prefill([read[i : i + step] for i in range(0, read.size, step)], cache)
        token = ids[-1:]
        for _ in range(new):
            token, logprobs = self._step(token, cache)
            yield int(token.item()), logprobs

    def _prefill(self, chunks: Sequence[mx.array], cache: list[KVCache]) -> None:
        sent = []
        coming = None if self._rank == 0 else self._receive(chunks[0].size)
        for i, chunk in enumerate(chunks):
            h = self._model.model.embed_tokens(chunk[None]) if coming is None else coming
            if coming is not None and i + 1 < len(chunks):
                coming = self._receive(chunks[i + 1].size)  # while this chunk is computed
            h = self._layers(h, cache)
            if not self._last:
                sent.append(self._send(h))
            mx.eval([c.state for c in cache])
        mx.eval(sent)

    def _step(self, token: mx.array, cache: list[KVCache]) -> tuple[mx.array, mx.array]:
        h = self._model.model.embed_tokens(token[None]) if self._rank == 0 else self._receive(1)
        h = self._layers(h, cache)
        logprobs = mx.zeros(0)
        found = mx.zeros(1, mx.int32)
        if self._last:
            h = self._model.model.norm(h)
            tied = self._model.args.tie_word_embeddings
            logits = self._model.model.embed_tokens.as_linear(h) if tied else self._model.lm_head(h)
            logprobs = (logits - mx.logsumexp(logits, keepdims=True))[0, -1]
            found = mx.argmax(logprobs, keepdims=True).astype(mx.int32)
        else:
            mx.eval(self._send(h))
        mx.eval(found, logprobs)
        return mx.distributed.all_sum(found, group=self._group), logprobs

    def _layers(self, h: mx.array, cache: list[KVCache]) -> mx.array:
        mask = create_attention_mask(h, cache[0])
        for layer, c in zip(self._model.model.layers, cache):
            h = layer(h, mask, c)
        return h

    def _send(self, h: mx.array) -> mx.array:
        sent = mx.distributed.send(h, self._rank + 1, group=self._group, stream=self._sending)
        mx.async_eval(sent)
        return sent

    def _receive(self, tokens: int) -> mx.array:
        shape = (1, tokens, self._model.args.hidden_size)
        h = mx.distributed.recv(shape, mx.float32, self._rank - 1, group=self._group, stream=self._receiving)
        mx.async_eval(h)
        return h
