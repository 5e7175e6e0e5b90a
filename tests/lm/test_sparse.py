"""The choice of an indexer: that of mlx-lm on one process, ties included."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import init
from ringattn.layout import Layout
from ringattn.lm.sharding import sparse
from ringattn.lm.sharding.sparse import Candidates, Scores, choose


@given(st.data())
def test_of_equal_scores_the_last_are_chosen(data: st.DataObject) -> None:
    """The rule is that of mx.argpartition on a CPU, which mlx-lm calls."""
    n = data.draw(st.integers(2, 60))
    count = data.draw(st.integers(1, n - 1))
    scores = mx.array([data.draw(st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 1.0]), min_size=n, max_size=n))])
    expected = mx.argpartition(scores, kth=-count, axis=-1, stream=mx.cpu)[..., -count:]
    assert np.flatnonzero(choose(scores, count)[0]).tolist() == sorted(expected[0].tolist())


def test_a_nan_is_chosen() -> None:
    """A wrong number must reach the output."""
    q = mx.array([[[[np.nan]]]])
    scores = Scores(q, mx.ones((1, 1, 1, 1)))(mx.ones((1, 1, 3, 1)), mx.arange(3), 1)
    assert choose(scores, 2).tolist() == [[[[True, True, False]]]]


def test_blocks_of_queries_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are made for some queries at a time, and none sees a later token."""
    rng = np.random.default_rng(0)
    score = Scores(mx.array(rng.normal(size=(1, 2, 9, 4))), mx.ones((1, 2, 9, 1)))
    keys = mx.array(rng.normal(size=(1, 1, 20, 4)))
    whole = sparse._chosen_in_blocks(score, keys, 7, 5)
    monkeypatch.setattr(sparse, "SCORES", 40)
    assert mx.array_equal(sparse._chosen_in_blocks(score, keys, 7, 5), whole)
    seen = np.arange(20) <= np.arange(7, 16)[:, None]
    assert (whole[0, 0].sum(axis=-1) >= 5).all() and not np.array(whole[0, 0])[~seen].any()


def test_one_rank_chooses_from_its_candidates() -> None:
    scores = mx.array([[[[1.0, 3.0, 2.0, 3.0, 0.0]]]])
    with init("solo") as ring:
        found = Candidates(scores, mx.arange(5), 3, Layout((((0, 5),),)), ring)
    assert found.indices.tolist() == [[[[1, 2, 3]]]]
    assert found.mask(Layout((((0, 5),),))).tolist() == [[[[False, True, True, True, False]]]]
