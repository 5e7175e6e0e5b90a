"""Timing of a whole language model: time to the first token, and time of each further token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import mlx.core as mx

from .. import lm
from ..transport.consensus import raise_on_all_ranks
from ..transport.interface import Transport
from .memory import PeakMemory
from .ranks import of_all
from .records import Record, Value

KEYS = ("ranks", "model", "dtype", "prompt")
FIGURES = ("prompt_tokens_s", "token_s", "sent_bytes", "peak_bytes")


class ModelBench:
    """Model whose answers are compared with mlx-lm's and then timed.

    Args:
        ring: The ring.
        name: Name of the model.
        dtype: Name of the dtype of the weights; ``None``: as they are.
        loaded: Model and tokenizer, as from `ringattn.lm.load`.
        checked: Tokens of the prompt that plain mlx-lm and the ring both read.
        new: Tokens of an answer.
    """

    def __init__(self, ring: Transport, name: str, dtype: str | None, loaded: tuple[Any, Any], checked: int, new: int):
        self._ring = ring
        self._name = name
        self._dtype = dtype
        self._new = new
        self._model, self._tokenizer = loaded
        self._checked = self._prompt(checked)
        with raise_on_all_ranks(ring, "bench generate"):
            plain = [self._plain_answer()] if ring.rank == 0 else []
        self._expected: list[int] = ring.broadcast(mx.array(plain[0]) if plain else None).tolist()  # type: ignore[assignment]
        lm.shard(self._model, ring)

    def problem(self) -> str:
        """How the ring's answer differs from plain mlx-lm's, or nothing. Collective."""
        found = [response.token for response in self._stream(self._checked)]
        if found == self._expected:
            return ""
        at = next((i for i, pair in enumerate(zip(found, self._expected)) if pair[0] != pair[1]), len(found))
        return f"token {at} of the answer is not that of plain mlx-lm"

    def measure(self, length: int, repeats: int) -> Record:
        """Time the answers to a prompt of `length` tokens. Collective."""
        ring = self._ring
        case: dict[str, Value] = {"ranks": ring.size, "transport": ring.backend, "model": self._name}
        case |= {"dtype": self._dtype or "own", "prompt": length, "new": self._new}
        if problem := self.problem():
            return Record("generate", case, problem=problem)
        prompt = self._prompt(length)
        memory = PeakMemory()
        before = ring.bytes_sent
        first: list[float] = []
        later: list[float] = []
        for _ in range(repeats):
            ring.barrier()
            times = [time.perf_counter()]
            for _response in self._stream(prompt):
                times.append(time.perf_counter())
            first.append(times[1] - times[0])
            later += [stop - start for start, stop in zip(times[1:], times[2:])]
        sent = (ring.bytes_sent - before) / repeats
        found = of_all(ring, {"sent_bytes": sent, "peak_bytes": memory.growth()})
        figures = {
            "prompt_tokens_s": length / median(first),
            "sent_bytes": sum(found["sent_bytes"]),
            "peak_bytes": max(found["peak_bytes"]),
        }
        if later:
            figures["token_s"] = median(later)
        return Record("generate", case, first, figures)

    def _prompt(self, length: int) -> list[int]:
        """The first tokens of a long English text, again from its beginning where it is too short."""
        from pydoc_data.topics import topics

        ids = self._tokenizer.encode("\n\n".join(topics.values())[: 8 * length])
        return (ids * (length // len(ids) + 1))[:length]

    def _plain_answer(self) -> list[int]:
        import mlx_lm

        stream = mlx_lm.stream_generate(self._model, self._tokenizer, self._checked, max_tokens=self._new)
        return [response.token for response in stream]

    def _stream(self, prompt: Sequence[int]) -> Any:
        return lm.stream_generate(self._model, self._tokenizer, list(prompt), max_tokens=self._new)
