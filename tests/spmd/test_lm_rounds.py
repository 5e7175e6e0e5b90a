"""Rounds of a prompt on a ring: the same tokens, with fewer bytes where the memory allows longer rounds."""

from __future__ import annotations

import os

import pytest

from ringattn import Ring

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from families import build, words

from ringattn import lm
from ringattn.lm import rounds
from ringattn.lm.host_memory import MEMORY

PROMPT = [i % 23 + 1 for i in range(600)]


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "SHORTEST", 16)
    monkeypatch.setattr("ringattn.lm.generate.SHORTEST", 16)
    monkeypatch.setattr(rounds, "ALONE", 32)


def read(model, ring: Ring, **options) -> tuple[list[int], int, list[int]]:
    """Tokens of the answer, bytes that this rank sent, and the progress after each round."""
    steps: list[int] = []
    before = ring.bytes_sent
    found = lm.stream_generate(
        model, words(), PROMPT, max_tokens=5, prompt_progress_callback=lambda done, _: steps.append(done), **options
    )
    return [one.token for one in found], ring.bytes_sent - before, steps


def test_fewer_rounds_send_less(ring: Ring) -> None:
    model = lm.shard(build("llama"), ring)
    tokens, sent, steps = read(model, ring)
    expected, most, more = read(model, ring, prefill_step_size=16)
    assert tokens == expected
    assert len(steps) < len(more)
    if ring.size > 1:
        assert sent < most


def test_the_rank_with_least_memory_decides(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm.shard(build("llama"), ring)
    expected, _, few = read(model, ring)
    if ring.rank == ring.size - 1:
        monkeypatch.setenv(MEMORY, str(model.footprint.needed(606, 1 / ring.size, 16)))
    tokens, _, steps = read(model, ring)
    assert tokens == expected
    assert len(steps) > len(few)
