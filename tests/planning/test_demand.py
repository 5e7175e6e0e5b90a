"""Counts in closed form, against the schedules by which the ring runs."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Layout
from ringattn.core.intervals import length, positions
from ringattn.core.masks import Band
from ringattn.lm.sharding.partition import Cost, round_layout
from ringattn.planning.demand import choose, pass_kv, pass_q
from ringattn.ring import schedule
from ringattn.ring.schedule import Sizes

BANDS = [Band.of(True, None), Band.of(False, None), Band.of(True, 5), Band.of(True, 40)]


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """The layouts of a round of prefill, and of the keys after it."""
    size = draw(st.integers(1, 6))
    weights = tuple(draw(st.lists(st.sampled_from([1.0, 2.0, 3.5]), min_size=size, max_size=size)))
    held = Layout(((),) * size, 0)
    new = held
    for _ in range(draw(st.integers(1, 3))):
        new = round_layout(held.stop, draw(st.integers(size, 70)), weights, Cost(100.0, 1.0))
        held = held.extend(new)
    return new, held


def compare(queries: Layout, keys: Layout, band: Band) -> None:
    """Compare both strategies' counts with those of the schedules, hop by hop and pair by pair."""
    spans = list(queries.spans), list(keys.spans)
    for name, found in (("pass_kv", pass_kv(*spans, band)), ("pass_q", pass_q(*spans, band))):
        exact = name == "pass_kv" or band.low is None  # with a window, keys in several spans have an upper bound
        equal = operator.eq if exact else operator.ge
        for rank in range(queries.size):
            plan = schedule.plan(queries, keys, band, name, rank)
            for h, hop in enumerate(plan.hops):
                if h:
                    assert equal(found.blocks[hop.source, h], length(hop.held))
                    assert name == "pass_kv" or equal(found.results[hop.source, h], length(hop.state))
                own, other = (queries.spans[rank], keys.spans[hop.source])
                if name == "pass_q":
                    own, other = queries.spans[hop.source], keys.spans[rank]
                distance = positions(other)[None, :] - positions(own)[:, None]
                low = -np.inf if band.low is None else band.low
                high = np.inf if band.high is None else band.high
                pairs = ((distance >= low) & (distance <= high)).sum()
                assert found.pairs[rank, hop.source] == pairs
        moved = schedule.traffic(queries, keys, band, name)
        assert equal(found.blocks.sum(), moved.blocks) and equal(found.results.sum(), moved.results)


@settings(deadline=None, max_examples=60)
@given(rounds(), st.sampled_from(BANDS))
def test_rounds_of_prefill(layouts: tuple[Layout, Layout], band: Band) -> None:
    compare(*layouts, band)


@pytest.mark.parametrize("band", BANDS[:2])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("make", [Layout.zigzag, Layout.contiguous])
def test_whole_sequences(make, size: int, band: Band) -> None:
    layout = make(53, size)
    compare(layout, layout, band)


@settings(deadline=None, max_examples=30)
@given(rounds(), st.integers(1, 9), st.integers(1, 9))
def test_the_strategy_is_that_of_the_ring(layouts: tuple[Layout, Layout], key: int, query: int) -> None:
    sizes = Sizes(key), Sizes(query, 2 * query)
    queries, keys = layouts
    name, _ = choose(list(queries.spans), list(keys.spans), BANDS[0], *sizes)
    assert name == schedule.choose(queries, keys, BANDS[0], *sizes)


def test_a_thousand_ranks_take_no_time() -> None:
    layout = Layout.zigzag(1 << 20, 1024)
    found = pass_kv(list(layout.spans), list(layout.spans), BANDS[0])
    assert found.pairs.sum() == (1 << 20) * ((1 << 20) + 1) // 2
