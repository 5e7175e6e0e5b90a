"""A recurrent layer's cache keeps the states to which a conversation is likely to go back."""

from __future__ import annotations

import os

import mlx.core as mx
import pytest

from ringattn import ArgumentError, Layout

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from ringattn.lm.sharding.forward_pass import cut_at_marks, step_through
from ringattn.lm.sharding.partition import Step
from ringattn.lm.sharding.recurrent_cache import KEPT, LONG_TAIL, STATE, TAIL, RecurrentCache, Slot
from ringattn.transport.solo import SoloRing


@pytest.fixture
def cache() -> RecurrentCache:
    """An empty cache, whose state will be the number of tokens."""
    return RecurrentCache(SoloRing(60.0), [Slot(STATE, 0, (1,), mx.float32)])


def read(cache: RecurrentCache, tokens: int) -> None:
    """Run one forward pass."""
    start = cache.size()
    with step_through([cache], Step(Layout((((start, start + tokens),),), start), True)):
        cache[0] = mx.array([float(start + tokens)])


def turn(cache: RecurrentCache, prompt: int, answer: int) -> None:
    """Read a prompt as a model does that keeps states, and then an answer token by token."""
    cache.expect_prompt(prompt)
    for part in cut_at_marks([cache], prompt):
        read(cache, part.stop - part.start)
    for _ in range(answer):
        read(cache, 1)


def test_states_around_a_prompt(cache: RecurrentCache) -> None:
    turn(cache, 3000, 7)
    assert list(cache.states) == [3000 - LONG_TAIL, 3000 - TAIL, 3006, 3007]
    assert all(arrays[0].item() == size for size, arrays in cache.states.items())
    assert [cache.restorable(n) for n in (5000, 3006, 3005, 2000, 1900)] == [3007, 3006, 2968, 1976, 0]


def test_a_second_try_leaves_the_states_before_it(cache: RecurrentCache) -> None:
    turn(cache, 3000, 7)
    for _ in range(5):
        cache.trim(cache.size() - cache.restorable(2999))
        assert cache.size() == 3000 - TAIL and cache.arrays[0].item() == cache.size()
        turn(cache, TAIL, 7)
    assert cache.restorable(2100) == 3000 - LONG_TAIL


def test_calls_of_tools_do_not_push_a_users_turn_out(cache: RecurrentCache) -> None:
    """Each result of a tool is a prompt. A template drops all thoughts since the turn when the next user speaks."""
    turn(cache, 3000, 50)
    for _ in range(2):
        turn(cache, 20, 50)
    assert cache.restorable(3000) == 3000 - TAIL
    assert len(cache.states) == KEPT + 2


def test_an_end_without_a_state(cache: RecurrentCache) -> None:
    turn(cache, 100, 3)
    with pytest.raises(ArgumentError, match=r"^n: 5 tokens to remove, expected [a-z ]* one of \[0, 68, 102, "):
        cache.trim(5)
    assert cache.trim(200) == 103 and cache.empty() and cache.states == {}


def test_a_pass_that_fails(cache: RecurrentCache) -> None:
    turn(cache, 100, 3)
    with pytest.raises(ZeroDivisionError), step_through([cache], Step(Layout((((103, 110),),), 103), True)):
        cache[0] = mx.array([110.0])
        1 / 0  # noqa: B018
    assert (cache.size(), cache.offset, cache.arrays[0].item()) == (103, 103, 103.0)
