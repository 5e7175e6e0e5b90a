"""A prompt that does not fit in the memory of one rank is refused on all of them."""

from __future__ import annotations

import os

import pytest

from ringattn import ArgumentError, Ring

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from families import build, words

from ringattn import lm
from ringattn.lm.host_memory import MEMORY
from ringattn.lm.limits import least_room, room_of

CHUNK = 16


def test_the_rank_with_least_memory_decides(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm.shard(build("llama"), ring)
    share = 1 / ring.size
    last = ring.size - 1
    tokens = 1500 if ring.rank == last else 3000
    monkeypatch.setenv(MEMORY, str(model.footprint.needed(tokens, share, CHUNK)))
    least = least_room(model, ring, CHUNK)
    longest = least.longest
    assert 1500 <= longest < 3000
    assert least.place.startswith(f"rank {last} (")
    if ring.rank == last:
        assert least == room_of(model, ring, CHUNK)

    def read(count: int, answer: int = 2) -> int:
        found = lm.stream_generate(model, words(), [1] * count, max_tokens=answer, prefill_step_size=CHUNK)
        return len([one.token for one in found])

    with pytest.raises(ArgumentError, match=rf"an answer of 2 \(max_tokens\) .* on rank {last} .*; {longest:,} tok"):
        read(longest - 1)
    with pytest.raises(ArgumentError, match=rf"prompt: {longest + 1:,} tokens of context need .* on rank {last} "):
        read(longest + 1, -1)  # without a limit the prompt alone is admitted
    assert read(200) == 2  # the ring still works


def test_a_wrong_size_on_one_rank(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm.shard(build("llama"), ring)
    if ring.rank == ring.size - 1:
        monkeypatch.setenv(MEMORY, "much")
    with pytest.raises(ArgumentError, match=rf"{MEMORY}: 'much', expected bytes"):
        list(lm.stream_generate(model, words(), [1] * 40, max_tokens=1))
