"""The hash of an input that all ranks share."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ringattn.transport.shared_input import SharedInput

VALUES = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40)


@given(VALUES)
def test_a_tag_is_the_same_in_the_graph_and_outside(values: list[int]) -> None:
    shared = SharedInput("input", mx.array([values], mx.int32), "")
    assert np.array(shared.tag).tobytes() == shared.tag_bytes


@given(VALUES, st.data())
def test_one_value_more_or_less_is_another_tag(values: list[int], data: st.DataObject) -> None:
    at, by = data.draw(st.integers(0, len(values) - 1)), data.draw(st.integers(1, 2**20))
    other = [value - by * (i == at) if value >= 0 else value + by * (i == at) for i, value in enumerate(values)]
    tags = [SharedInput("input", mx.array(x, mx.int32), "").tag_bytes for x in (values, other)]
    assert tags[0] != tags[1]
