"""The number of rounds of a prompt: as few as memory, an even division and patience allow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn.lm.rounds import ALONE, SHORTEST, UNEVEN, count_rounds, divide
from ringattn.lm.sharding.partition import Cost

LINEAR = Cost(1e9, 1.0)  # attention is next to nothing: all chunks of a round are equal
ATTENTION = Cost(1.0, 1e6)
PATIENT = 1e30  # operations of a round

COSTS = st.builds(Cost, st.floats(1.0, 1e9), st.floats(1.0, 1e6))
WEIGHTS = st.lists(st.floats(0.1, 4.0), min_size=1, max_size=5)


def always(held, chunks) -> bool:
    return True


def never(held, chunks) -> bool:
    return False


def test_one_round_where_nothing_forbids_it() -> None:
    assert count_rounds(0, 100_000, (1.0, 1.0), LINEAR, PATIENT, always) == 1


def test_shortest_rounds_where_memory_is_missing() -> None:
    assert count_rounds(0, 100_000, (1.0, 1.0), LINEAR, PATIENT, never) == -(-100_000 // (2 * SHORTEST))
    assert count_rounds(0, SHORTEST, (1.0, 1.0), LINEAR, PATIENT, never) == 1


def test_as_many_rounds_as_the_memory_asks_for() -> None:
    count = count_rounds(0, 100_000, (1.0, 1.0), LINEAR, PATIENT, lambda held, chunks: max(chunks) <= 20_000)
    assert count == 3


def test_a_round_takes_a_limited_time() -> None:
    work = 100_000 * (LINEAR.linear + LINEAR.attention * 50_000) / 2
    assert count_rounds(0, 100_000, (1.0, 1.0), LINEAR, work / 4, always) == 4


def test_operations_count_the_tokens_before_the_prompt() -> None:
    cost = Cost(1e9, 1e4)
    assert [count_rounds(start, 10_000, (1.0, 1.0), cost, 2e12, always) for start in (0, 100_000)] == [2, 5]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_no_rank_holds_much_more_than_its_share(size: int) -> None:
    weights = (1.0,) * size
    tokens = 80_000 * size
    count = count_rounds(0, tokens, weights, ATTENTION, PATIENT, always)
    held, _ = divide(0, tokens, weights, ATTENTION, count)
    most, share = max(held), tokens / size
    assert sum(held) == tokens
    assert most <= 1.11 * share
    fewer, _ = divide(0, tokens, weights, ATTENTION, max(1, count * 2 // 3))
    assert max(fewer) > UNEVEN * share


def test_one_rank_has_rounds_of_mlx_lm() -> None:
    assert count_rounds(0, 10 * ALONE, (1.0,), LINEAR, PATIENT, always) == 10


@given(st.integers(0, 50_000), st.integers(1, 50_000), WEIGHTS, COSTS, st.floats(1e9, 1e15))
def test_rounds_are_never_shorter_than_the_shortest(
    start: int, tokens: int, weights: list[float], cost: Cost, operations: float
) -> None:
    size = len(weights)
    count = count_rounds(start, tokens, weights, cost, operations, always)
    assert 1 <= count <= max(1, -(-tokens // (SHORTEST * size)))


@given(st.integers(1, 50_000), WEIGHTS, COSTS, st.integers(1, 40))
def test_all_tokens_are_divided(tokens: int, weights: list[float], cost: Cost, count: int) -> None:
    held, chunks = divide(0, tokens, weights, cost, count)
    assert tokens - 16 * len(weights) * count <= sum(held) <= tokens  # a few may be computed by all ranks
    assert all(chunk <= own for chunk, own in zip(chunks, held))
