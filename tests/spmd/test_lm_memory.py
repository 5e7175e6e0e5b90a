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
from ringattn.lm.limits import agree_on_longest, longest_context

CHUNK = 16


def test_the_rank_with_least_memory_decides(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm.shard(build("llama"), ring)
    share = 1 / ring.size
    last = ring.size - 1
    tokens = 1500 if ring.rank == last else 3000
    monkeypatch.setenv(MEMORY, str(model.footprint.needed(tokens, share, CHUNK)))
    longest = agree_on_longest(model, ring, CHUNK)
    assert 1500 <= longest < 3000
    if ring.rank == last:
        assert longest == longest_context(model, ring, CHUNK)[0]

    def read(count: int) -> int:
        found = lm.stream_generate(model, words(), [1] * count, max_tokens=2, prefill_step_size=CHUNK)
        return len([one.token for one in found])

    with pytest.raises(ArgumentError, match=rf"on rank {last} .*; {longest:,} tokens fit"):
        read(longest + 1)
    assert read(200) == 2  # the ring still works


def test_a_wrong_size_on_one_rank(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm.shard(build("llama"), ring)
    if ring.rank == ring.size - 1:
        monkeypatch.setenv(MEMORY, "much")
    with pytest.raises(ArgumentError, match=rf"{MEMORY}: 'much', expected bytes"):
        list(lm.stream_generate(model, words(), [1] * 40, max_tokens=1))
