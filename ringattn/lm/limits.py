"""Limits of a model's input: its configuration's token ids and positions, and the memory of the ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import mlx.nn as nn

from ..errors import ArgumentError
from ..transport.consensus import agree, raise_on_all_ranks
from ..transport.interface import Transport
from .host_memory import MEMORY, memory_of_rank
from .memory import CacheLayer, Footprint
from .mlx_lm_compat import model_args

POSITIONS = ("max_position_embeddings", "n_positions", "model_max_length", "n_ctx")  # names for the longest context
GIB = 1 << 30
DIVIDE = "The weights leave no room: divide them among ranks (--tensor)"


def vocabulary(model: nn.Module) -> int:
    """The number of token ids that the model knows."""
    for config in _configurations(model):
        if isinstance(size := config.get("vocab_size"), int):
            return size
    tables = [part.weight for part in model.modules() if isinstance(part, nn.Embedding | nn.QuantizedEmbedding)]
    return max(int(table.shape[0]) for table in tables)


def context_limit(model: nn.Module) -> int | None:
    """The tokens of context that the model was made for, with those that its rope's scaling adds; ``None``: unknown."""
    for config in _configurations(model):
        limits = [config[name] for name in POSITIONS if isinstance(config.get(name), int)]
        if limits:
            return max(limits[0], _stretched(config))
    return None


@dataclass(frozen=True)
class Room:
    """Memory of one rank, and the contexts that fit in it.

    Attributes:
        place: The rank and its host, for people.
        footprint: Memory that the model needs.
        available: Bytes that the rank may use.
        share: The part of the context that the rank holds.
        chunk: Tokens that the rank computes in a round of prefill.
    """

    place: str
    footprint: Footprint
    available: int
    share: float
    chunk: int

    @property
    def longest(self) -> int:
        """Tokens of context that fit."""
        return _longest(self.footprint, self.available, self.share, self.chunk)

    def refusal(self, context: int, answer: int, longest: int) -> str:
        """Text of an error, in one line.

        Args:
            context: Tokens of the prompt, with those of its cache.
            answer: Tokens of the answer.
            longest: Tokens of context that fit on all ranks.
        """
        needed = self.footprint.needed(context + answer, self.share, self.chunk)
        asked = f" and an answer of {answer:,} (max_tokens)" if answer else ""
        shorten = f"Shorten the prompt{', lower max_tokens' if answer else ''}, add ranks"
        return (
            f"prompt: {context:,} tokens of context{asked} need {needed / GIB:.2f} GiB on {self.place}, which has "
            f"{self.available / GIB:.2f} GiB; {longest:,} tokens fit. {shorten if longest else DIVIDE}, or set "
            f"{MEMORY} if the rank may use more"
        )


def room_of(model: Any, everyone: Transport, chunk: int) -> Room:
    """Memory of this rank.

    Args:
        model: A sharded model.
        everyone: All ranks.
        chunk: Tokens that a rank computes in a round of prefill.
    """
    share = model.weights[model.ring.rank] / sum(model.weights)
    place = f"rank {everyone.rank} ({everyone.hosts[everyone.rank]})"
    own_chunk = int(chunk * share * len(model.weights))
    return Room(place, model.footprint, memory_of_rank(everyone), share, own_chunk)


def least_room(model: Any, everyone: Transport, chunk: int) -> Room:
    """The room of the rank where the shortest contexts fit; the arguments are those of `room_of`. Collective."""
    what = "the longest context"
    with raise_on_all_ranks(everyone, what):
        own = json.dumps(asdict(room_of(model, everyone, chunk))).encode()
    with everyone.call(what):
        replies = agree(everyone, what, payload=[memoryview(own)])
    return min((_parse(bytes(reply)) for reply in replies), key=lambda room: room.longest)


def _parse(text: bytes) -> Room:
    fields = json.loads(text)
    footprint = fields["footprint"]
    layers = tuple(CacheLayer(**layer) for layer in footprint["layers"])
    return Room(**{**fields, "footprint": Footprint(**{**footprint, "layers": layers})})


def check_memory(model: Any, everyone: Transport, context: int, longest: int, chunk: int, *, answer: int = 0) -> None:
    """Raise on every rank if the context and its answer do not fit in the memory of one. Collective where they do not.

    Args:
        model: A sharded model.
        everyone: All ranks.
        context: Tokens of the context.
        longest: The smallest of the longest contexts of all ranks' rooms.
        chunk: As in `room_of`.
        answer: Tokens of the answer; 0 where there is no limit.

    Raises:
        ArgumentError: `context` and `answer` together are above `longest`.
    """
    if context + answer <= longest:
        return
    with raise_on_all_ranks(everyone, "stream_generate"):
        own = room_of(model, everyone, chunk)
        if own.longest < context + answer:
            raise ArgumentError(own.refusal(context, answer, longest))
    agree(everyone, "stream_generate")


@lru_cache(maxsize=16)
def _longest(footprint: Footprint, available: int, share: float, chunk: int) -> int:
    return footprint.longest(available, share, chunk)


def _configurations(model: nn.Module) -> Iterator[Mapping[str, Any]]:
    """The configurations of the model and its parts, the outermost first."""
    for part in _parts(model):
        args = model_args(part)
        if hasattr(args, "__dict__"):
            yield vars(args)


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """The model and its parts. These are listed only if the model is not enough: that takes milliseconds."""
    yield model
    yield from model.modules()


def _stretched(config: Mapping[str, Any]) -> int:
    """The context that the rope's scaling allows; 0 where the configuration has no factor and original length."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, Mapping):
        return 0
    factor = scaling.get("factor")
    original = scaling.get("original_max_position_embeddings")
    if not isinstance(factor, int | float) or not isinstance(original, int | float):
        return 0
    return int(factor * original)
