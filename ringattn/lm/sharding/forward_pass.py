"""A forward pass of a sharded model, and what all of its caches have in common."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ...layout import Layout
from ...ring.call import check_ring
from ...transport.base import Ring
from .history import TokenHistory
from .partition import Step


class ForwardPass(threading.local):
    """The forward pass that this thread is in.

    Attributes:
        caches: The caches of the layers.
        reading: The cache that a layer has read last. A recurrent layer reads its state before it computes anything
            from it, so this is the cache of the layer that runs.
        is_read: Whether the output of the pass is read. Otherwise only what the caches keep counts.
    """

    caches: Sequence[ShardedCache] = ()
    reading: ShardedCache | None = None
    is_read: bool = True

    def needs_output(self, own: int = 0) -> bool:
        """Whether anything reads the output of the layer that runs; the same on every rank.

        MLX computes what is read, and nothing else. A collective call computes at once, so its caller asks. A cache
        that a pass never writes makes every output count.

        Args:
            own: Arrays of its cache that the layer has yet to write, and that do not depend on its output.
        """
        return self.is_read or sum(cache.unwritten for cache in self.caches) > own


current = ForwardPass()


class ShardedCache:
    """Cache of one layer of a sharded model. mlx-lm calls it as it calls its own caches.

    A model that went through `ringattn.lm.shard` calls `begin` before its layers run.

    Args:
        ring: The ring, of `ringattn.init`.
        history: The ids of the tokens, one object for all layers of a model.

    Attributes:
        layout: The tokens of the context that each rank holds.
        offset: The position of the next token that this rank computes (mlx-lm's rope asks for it).
        step: The tokens of the forward pass; ``None`` before the first one.
        marks: Numbers of tokens after which a forward pass is cut in two, since the state there is kept.
        unread: Number of first tokens of the context whose logits nobody reads.
        loss: Why the cache may have lost what is needed to go back to fewer tokens.
    """

    marks: tuple[int, ...] = ()
    unread = 0
    loss = ""

    def __init__(self, ring: Ring, history: TokenHistory | None = None):
        self.ring = check_ring(ring)
        self.history = history or TokenHistory()
        self.layout = Layout(((),) * ring.size, 0)
        self.offset = 0
        self.step: Step | None = None

    def begin(self, step: Step) -> None:
        """Set the positions for a forward pass of the tokens of `step`."""
        self.step = step
        self.offset = self.own_start(step)

    def own_start(self, step: Step) -> int:
        """The position of the first token that this rank computes in a step."""
        return step.new.spans[self.ring.rank][0][0] if step.shared else step.new.start

    def end(self) -> None:
        """Clear the state of the forward pass."""
        self.offset = self.layout.stop

    def abandon(self) -> None:
        """Go back to the tokens before a forward pass that has failed."""
        assert self.step is not None
        self.trim(self.size() - self.step.new.start)
        self.end()

    def size(self) -> int:
        """The number of tokens in the context, on all ranks together."""
        return self.layout.stop

    @property
    def unwritten(self) -> int:
        """The number of arrays that this forward pass has yet to write."""
        raise NotImplementedError

    @property
    def tokens(self) -> np.ndarray:
        """The ids of the context's tokens, also of those that a window has dropped: ``[batch, tokens]``, int32."""
        return self.history.read(self.size())

    @property
    def held_bytes(self) -> int:
        """Bytes that the context takes on this rank, without the room for more tokens."""
        raise NotImplementedError

    @property
    def form(self) -> str:
        """Properties that depend on the model and not on its context, for comparisons and messages."""
        raise NotImplementedError

    def expect_prompt(self, tokens: int) -> None:
        """Prepare for a prompt of so many tokens, which a later call may take back."""

    def restorable(self, size: int) -> int:
        """The largest number of first tokens, at most `size`, that `trim` can leave in the cache."""
        raise NotImplementedError

    def trim(self, n: int) -> int:
        """Remove the last `n` tokens; return how many were removed. Every rank calls it."""
        raise NotImplementedError


@contextmanager
def step_through(caches: Sequence[ShardedCache], step: Step, is_read: bool = True) -> Iterator[None]:
    """Run a forward pass: the tokens of `step` through the layers of `caches`. If it fails, they hold what they held.

    Layers with a window may have dropped tokens that no later token needs. `is_read` is that of `ForwardPass`.
    """
    for cache in caches:
        cache.begin(step)
    before = current.caches, current.reading, current.is_read
    current.caches, current.reading, current.is_read = caches, None, is_read
    try:
        yield
    except BaseException:
        for cache in caches:
            cache.abandon()
        raise
    else:
        for cache in caches:
            cache.end()
    finally:
        current.caches, current.reading, current.is_read = before


def flat(caches: Iterable[Any]) -> list[Any]:
    """The caches of all layers, in order; a layer may have several, in mlx-lm's `CacheList`."""
    return [leaf for cache in caches for leaf in (flat(cache.caches) if hasattr(cache, "caches") else [cache])]


def size_of(caches: Iterable[Any]) -> int:
    """The number of tokens that `caches` hold, on all ranks together."""
    return int(flat(caches)[0].size())


def tokens_of(caches: Iterable[Any]) -> list[int]:
    """The ids of the tokens that `caches` hold, for a batch of one."""
    ids: list[int] = flat(caches)[0].tokens.reshape(-1).tolist()
    return ids


def trim_to(caches: Iterable[Any], size: int) -> None:
    """Leave the first `size` tokens in `caches`, a number that is `restorable`. Every rank calls it."""
    for cache in flat(caches):
        cache.trim(cache.size() - size)


def cut_at_marks(caches: Iterable[ShardedCache], tokens: int) -> list[slice]:
    """The parts of so many new tokens that end at marks, in order; the last one ends with the tokens."""
    marks = {mark - cache.size() for cache in caches for mark in cache.marks}
    ends = [*sorted(mark for mark in marks if 0 < mark < tokens), tokens]
    return [slice(start, stop) for start, stop in zip([0, *ends], ends)]


def restorable(caches: Iterable[ShardedCache], size: int) -> int:
    """The largest number of first tokens, at most `size`, that all of `caches` can be trimmed to."""
    leaves = flat(caches)
    while (least := min(cache.restorable(size) for cache in leaves)) < size:
        size = least
    return size
