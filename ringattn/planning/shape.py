"""The numbers of a language model that decide its time and memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ..lm.memory import CacheLayer, Footprint
from ..lm.sharding.partition import Cost
from ..ring.schedule import Sizes

LAST = 0.1  # of the products of the last layer that a prompt needs: those of keys and values, roughly


@dataclass(frozen=True)
class Attending:
    """Layers of one kind that attend to keys of a cache.

    Attributes:
        count: Number of such layers.
        pair_flops: Operations of a pair of a query and a key, all heads together.
        key: Bytes of the keys and values of a token.
        query: Bytes of a query token and of its state, as they travel.
        kv_heads: Key/value heads; 1 for latent vectors, which a row of ranks does not divide.
        window: Tokens of the layers' window; ``None``: all tokens.
    """

    count: int
    pair_flops: float
    key: int
    query: Sizes
    kv_heads: int = 1
    window: int | None = None

    def divided(self, parts: int) -> Attending:
        """The part of these layers on one rank of a row."""
        key = self.key // parts if self.kv_heads > 1 else self.key
        query = Sizes(self.query.block // parts, self.query.result // parts)
        return Attending(self.count, self.pair_flops / parts, key, query, self.kv_heads // parts or 1, self.window)


@dataclass(frozen=True)
class ModelShape:
    """A language model, or a number of attention layers.

    Attributes:
        name: Name for people.
        depth: Number of layers.
        attending: The layers that attend, by kind.
        hidden: Bytes of the hidden state of a token.
        linear: Operations for a token in all layers, besides attention.
        divided: Bytes of the weights of the layers, which a row divides.
        whole: Bytes of the other weights, which every rank has.
        read: Bytes of weights that a new token reads in all layers.
        head: Bytes of the output layer.
        heads: Attention heads.
        states: Bytes of the states of recurrent layers.
        activations: Bytes that a token of a round of prefill needs beside the cache.
        can_divide: Whether mlx-lm can divide the weights.
        positions: Tokens of context that the model was made for; ``None``: unknown.
    """

    name: str
    depth: int
    attending: tuple[Attending, ...]
    hidden: int = 0
    linear: float = 0.0
    divided: int = 0
    whole: int = 0
    read: int = 0
    head: int = 0
    heads: int = 1
    states: int = 0
    activations: int = 0
    can_divide: bool = False
    positions: int | None = None

    @property
    def prompt_linear(self) -> float:
        """Operations for a token of a prompt in all layers, besides attention.

        The last layer computes little more than its keys and values: of a prompt but for its last token, mlx-lm
        evaluates the caches alone.
        """
        return self.linear * (self.depth - 1 + LAST) / self.depth

    @property
    def prompt_attending(self) -> tuple[Attending, ...]:
        """The layers whose attention a prompt needs: all but the last one, which counts as one of the last kind."""
        if self.is_attention_only or not self.attending:
            return self.attending
        *others, last = self.attending
        return (*others, replace(last, count=last.count - 1))

    @property
    def is_attention_only(self) -> bool:
        """Whether there are no weights."""
        return not self.divided

    @property
    def attention_heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads and head dimension of the first kind of attention."""
        kind = self.attending[0] if self.attending else Attending(1, 4.0 * 128, 0, Sizes(0))
        return self.heads, max(1, min(kind.kv_heads, self.heads)), max(1, round(kind.pair_flops / 4 / self.heads))

    @property
    def cost(self) -> Cost:
        """The cost of a mean layer, by which a round of prefill is partitioned."""
        pairs = sum(kind.count * kind.pair_flops for kind in self.attending)
        return Cost(self.linear / self.depth, pairs / self.depth)

    def tensor_sizes(self, ranks: int) -> list[int]:
        """The numbers of ranks in a row, up to `ranks`, among which the weights and the heads can be divided."""
        kv_heads = [kind.kv_heads for kind in self.attending if kind.kv_heads > 1]
        sizes = (parts for parts in range(2, ranks + 1) if ranks % parts == 0) if self.can_divide else ()
        return [1, *(n for n in sizes if self.heads % n == 0 and all(heads % n == 0 for heads in kv_heads))]

    def part(self, parts: int) -> ModelShape:
        """The part of the model on one rank of a row."""
        if parts == 1:
            return self
        return ModelShape(
            **{
                **vars(self),
                "attending": tuple(kind.divided(parts) for kind in self.attending),
                "linear": self.linear / parts,
                "divided": self.divided // parts,
                "read": self.read // parts,
                "heads": self.heads // parts,
            }
        )

    def footprint(self, layers: float = 1.0) -> Footprint:
        """The memory of a rank with a part of the layers."""
        kinds = Counter({(kind.key, kind.window): round(kind.count * layers + 0.499) for kind in self.attending})
        caches = tuple(CacheLayer(*kind) for kind, count in kinds.items() for _ in range(count))
        return Footprint(int(self.divided * layers) + self.whole, caches, int(self.states * layers), self.activations)


def attention_shape(heads: int, kv_heads: int, head_dim: int, item: int, layers: int = 1) -> ModelShape:
    """Attention alone, of so many heads and elements of `item` bytes."""
    query = Sizes(heads * head_dim * item, heads * (head_dim + 2) * 4)
    kind = Attending(layers, 4.0 * heads * head_dim, 2 * kv_heads * head_dim * item, query, kv_heads)
    held = 2 * query.block + query.result  # queries, output and state
    name = f"attention, {heads}/{kv_heads} heads of {head_dim}"
    return ModelShape(name, layers, (kind,), heads=heads, activations=held)
