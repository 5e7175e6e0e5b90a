"""Tests of `Layout`: the positions of each rank, and arrays cut and joined. Its errors are in test_validation."""

from __future__ import annotations

from collections import Counter
from dataclasses import FrozenInstanceError
from itertools import groupby

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Layout
from ringattn.core.intervals import indices, intersection, length, locate, positions, union

steady = settings(deadline=None, derandomize=True, max_examples=100)

sizes, lengths, starts = st.integers(1, 9), st.integers(0, 50), st.integers(-20, 100)
some_weights = st.lists(st.sampled_from([0, 0.5, 1, 2, 3.7, 1e-9, 40]), min_size=1, max_size=9).filter(any)


def from_owners(owners: list[int], size: int, start: int) -> Layout:
    """Make the layout in which token i is at rank ``owners[i]``, one span a token."""
    return Layout(
        [[(start + i, start + i + 1) for i, own in enumerate(owners) if own == r] for r in range(size)], start
    )


@st.composite
def layouts(draw: st.DrawFn, start: int | None = None, size: int | None = None) -> Layout:
    """Draw any layout: from one of the constructors, or with tokens at random ranks."""
    n, size = draw(lengths), size or draw(sizes)
    start = draw(starts) if start is None else start
    kind = draw(st.sampled_from(["contiguous", "zigzag", "cyclic", "weighted", "scattered"]))
    if kind == "cyclic":
        return Layout.cyclic(n, size, draw(st.integers(1, 7)), start=start)
    if kind == "weighted":
        weights = st.lists(st.floats(0, 5), min_size=size, max_size=size).filter(any)
        return Layout.weighted(n, draw(weights), start=start)
    if kind == "scattered":
        owner = st.integers(0, size - 1)
        return from_owners(draw(st.lists(owner, min_size=n, max_size=n)), size, start)
    return getattr(Layout, kind)(n, size, start=start)


def owners_of(layout: Layout) -> list[int]:
    """List the rank of every token, in global order."""
    found = {p: rank for rank in range(layout.size) for p in layout.positions(rank).tolist()}
    return [found[p] for p in range(layout.start, layout.stop)]


def total_weight(layout: Layout, rank: int) -> int:
    """Count the keys that the queries of `rank` see under a causal mask."""
    return int(sum(p - layout.start + 1 for p in layout.positions(rank).tolist()))


# Spans, against sets of integers


spans = st.lists(st.tuples(st.integers(-9, 30), st.integers(-9, 30)), max_size=6)


def members(some: tuple) -> set[int]:
    return {i for start, stop in some for i in range(start, stop)}


@steady
@given(spans, spans)
def test_spans_are_sets(a, b):
    x, y = union(a), union(b)
    assert members(x) == members(a)
    assert all(stop < start for (_, stop), (start, _) in zip(x, x[1:])), "adjacent spans are one"
    assert members(intersection(x, y)) == members(x) & members(y)
    assert length(x) == len(members(x))
    assert positions(x).dtype == np.int32 and positions(x).tolist() == sorted(members(x))
    part = intersection(x, y)
    found = locate(part, x)
    assert positions(x)[positions(found)].tolist() == positions(part).tolist()
    assert found == union(found), "as few spans as can be"
    assert [positions(x)[i] for i in indices(part, x)] == [start for start, _ in part]


# Positions of a layout


@steady
@given(layouts())
def test_positions_partition_the_sequence(layout):
    held = [layout.positions(rank) for rank in range(layout.size)]
    assert sorted(p for part in held for p in part.tolist()) == list(range(layout.start, layout.stop))
    assert layout.stop - layout.start == layout.length == sum(len(part) for part in held)
    for rank, part in enumerate(held):
        assert part.dtype == np.int32 and np.all(np.diff(part) > 0)
        assert layout.local_length(rank) == len(part)
        assert part.tolist() == [p for span in layout.spans[rank] for p in range(*span)]


@steady
@given(lengths, sizes, starts)
def test_contiguous(n, size, start):
    layout = Layout.contiguous(n, size, start=start)
    assert (layout.start, layout.length, layout.size) == (start, n, size)
    assert owners_of(layout) == sorted(owners_of(layout))
    assert [layout.local_length(r) for r in range(size)] == [n // size + (r < n % size) for r in range(size)]


@steady
@given(lengths, sizes, starts)
def test_zigzag_holds_two_chunks_a_rank(n, size, start):
    layout = Layout.zigzag(n, size, start=start)
    count = 2 * size
    chunks = np.split(np.arange(start, start + n), np.cumsum([n // count + (c < n % count) for c in range(count)])[:-1])
    assert layout.start == start
    for rank in range(size):
        assert layout.positions(rank).tolist() == [*chunks[rank], *chunks[count - 1 - rank]]


@steady
@given(st.integers(0, 8), sizes)
def test_zigzag_shares_causal_work_equally(chunk, size):
    layout = Layout.zigzag(2 * size * chunk, size)
    assert len({total_weight(layout, rank) for rank in range(size)}) == 1


@steady
@given(lengths, some_weights, starts)
def test_weighted_is_in_proportion(n, weights, start):
    layout = Layout.weighted(n, weights, start=start)
    assert (layout.start, layout.length, layout.size) == (start, n, len(weights))
    for rank, weight in enumerate(weights):
        assert abs(layout.local_length(rank) - n * weight / sum(weights)) < 2, (
            "each of two chunks is off by less than 1"
        )
        assert weight or not layout.local_length(rank)
    order = [*range(len(weights)), *reversed(range(len(weights)))]
    runs = [own for own, _ in groupby(owners_of(layout))]
    assert _is_subsequence(runs, order), "mirrored pairs"


def _is_subsequence(part: list[int], whole: list[int]) -> bool:
    rest = iter(whole)
    return all(x in rest for x in part)


@steady
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.integers(1, 5))
def test_weighted_work_is_in_proportion(weights, scale):
    """Causal work is exactly in proportion where the weights divide the tokens exactly."""
    layout = Layout.weighted(2 * scale * sum(weights), weights)
    work = [total_weight(layout, rank) for rank in range(layout.size)]
    assert [w * sum(weights) for w in work] == [sum(work) * weight for weight in weights]


@pytest.mark.parametrize(
    "weights",
    [[1e308, 1e308, 1e308], [5e-324, 5e-324, 5e-324], [np.float16(9000)] * 3, [np.int8(50)] * 3, [2**70, 2**70, 2**70]],
    ids=["huge", "tiny", "float16", "int8", "long"],
)
def test_weights_of_any_size_and_type(weights):
    """Proportions must not overflow in the type of the weights."""
    assert Layout.weighted(3000, weights) == Layout.weighted(3000, [1, 1, 1])


@steady
@given(lengths, sizes, st.integers(1, 9), starts)
def test_cyclic_deals_round_and_round(n, size, chunk, start):
    layout = Layout.cyclic(n, size, chunk, start=start)
    assert layout.start == start
    assert owners_of(layout) == [i // chunk % size for i in range(n)]


@steady
@given(st.data(), sizes)
def test_extend(data, size):
    first = data.draw(layouts(size=size))
    second = data.draw(layouts(start=first.stop, size=size))
    whole = first.extend(second)
    assert (whole.start, whole.stop) == (first.start, second.stop)
    for rank in range(size):
        assert whole.positions(rank).tolist() == [*first.positions(rank), *second.positions(rank)]


def test_extend_token_by_token():
    """Decoding gives each new token to some rank. Adjacent spans are joined."""
    layout = Layout.contiguous(0, 2, start=5)
    for i in range(5, 9):
        layout = layout.extend(Layout([[(i, i + 1)], []]))
    assert layout == Layout([[(5, 9)], []]) and layout.spans == (((5, 9),), ())


# Equality


@steady
@given(layouts(), st.randoms(use_true_random=False))
def test_equal_where_the_tokens_are_placed_alike(layout, random):
    """Layouts are equal, and equal keys of a dict, however spans are split and empty spans inserted."""
    cut = [[piece for span in rank_spans for piece in _cut_up(span, random)] for rank_spans in layout.spans]
    other = Layout(cut, layout.start)
    assert other == layout and hash(other) == hash(layout) and other.summary == layout.summary
    assert {layout: 1}[other] == 1
    assert other.spans == layout.spans


def _cut_up(span: tuple[int, int], random) -> list[tuple[int, int]]:
    cuts = sorted(random.randint(*span) for _ in range(random.randint(0, 3)))
    return [[a, b] for a, b in zip([span[0], *cuts], [*cuts, span[1]])]


@steady
@given(layouts(), layouts())
def test_different_where_they_are_not(a, b):
    same = (a.start, a.size, owners_of(a)) == (b.start, b.size, owners_of(b))
    assert (a == b) == same == (a.summary == b.summary)


@steady
@given(layouts().filter(lambda layout: layout.length and layout.size > 1), st.data())
def test_one_token_elsewhere_makes_a_difference(layout, data):
    owners = owners_of(layout)
    i = data.draw(st.integers(0, layout.length - 1))
    owners[i] = (owners[i] + data.draw(st.integers(1, layout.size - 1))) % layout.size
    other = from_owners(owners, layout.size, layout.start)
    assert other != layout and other.summary != layout.summary
    moved = from_owners(owners, layout.size, layout.start + 1)
    assert moved != other and moved.summary != other.summary


def test_an_empty_layout_knows_its_start():
    assert Layout([[], []]).start == 0
    assert Layout([[], []], 7) == Layout.contiguous(0, 2, start=7) != Layout.contiguous(0, 2)
    assert Layout([[], []], 7).summary != Layout([[], []]).summary


def test_immutable():
    layout = Layout.zigzag(8, 2)
    with pytest.raises(FrozenInstanceError):
        layout.start = 3
    with pytest.raises(FrozenInstanceError):
        layout.spans = ()
    given_spans = [[(0, 2)], [(2, 4)]]
    layout = Layout(given_spans)
    given_spans[0].append((4, 6))
    assert layout.length == 4
    assert isinstance(layout.spans, tuple) and all(isinstance(s, tuple) for s in layout.spans)
    layout.positions(0)[:] = 99  # the caller owns this array
    assert layout.positions(0).tolist() == [0, 1]


def test_numpy_integers_are_integers():
    layout = Layout([[(np.int64(0), np.int32(4))]], np.int16(0))
    assert layout == Layout.contiguous(np.int64(4), np.uint8(1))
    assert {type(x) for x in (layout.start, *layout.spans[0][0])} == {int}


def test_thousands_of_spans():
    layout = Layout.cyclic(20_000, 3, 2)
    assert Counter(owners_of(layout)) == {0: 6668, 1: 6666, 2: 6666}
    x = np.arange(20_000)
    np.testing.assert_array_equal(layout.unshard([layout.shard(x, r, 0) for r in range(3)], 0), x)


# Arrays


@steady
@given(layouts(), st.integers(-4, 3), st.sampled_from(["mx", "numpy"]))
def test_shard_and_unshard(layout, axis, kind):
    shape = [2, 3, 2, 3]
    shape[axis] = layout.length
    whole = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    x = mx.array(whole) if kind == "mx" else whole
    parts = [layout.shard(x, rank, axis) for rank in range(layout.size)]
    for rank, part in enumerate(parts):
        assert type(part) is type(x) and part.dtype == x.dtype
        np.testing.assert_array_equal(np.array(part), whole.take(layout.positions(rank) - layout.start, axis))
    again = layout.unshard(parts, axis)
    assert type(again) is type(x) and again.dtype == x.dtype
    np.testing.assert_array_equal(np.array(again), whole)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.bool_, mx.uint32])
def test_shard_keeps_the_dtype(dtype):
    layout = Layout.zigzag(7, 2)
    x = mx.arange(14).reshape(1, 1, 7, 2).astype(dtype)
    parts = [layout.shard(x, rank) for rank in range(2)]
    assert all(part.dtype == dtype for part in parts)
    assert mx.array_equal(layout.unshard(parts), x)


def test_axis_2_is_the_default():
    layout = Layout.contiguous(5, 2)
    assert layout.shard(mx.zeros((2, 3, 5, 4)), 0).shape == (2, 3, 3, 4)
    assert layout.unshard(iter([mx.zeros((2, 3, 3, 4)), mx.zeros((2, 3, 2, 4))])).shape == (2, 3, 5, 4)


def test_repr_is_the_layout_or_its_beginning():
    short = Layout.zigzag(16, 2, start=3)
    assert repr(short) == "Layout(spans=(((3, 7), (15, 19)), ((7, 15),)), start=3)"
    assert eval(repr(short)) == short
    long = repr(Layout.cyclic(100_000, 4, 16))
    assert long.startswith("Layout(spans=(((0, 16), (64, 80), ") and "...)" in long and len(long) < 1000


@pytest.mark.parametrize(
    ("layout", "what"),
    [
        (Layout.zigzag(16, 2), "0..16 on 2 ranks; rank 0 has 0..4, 12..16"),
        (Layout.cyclic(16, 2, 2), "0..16 on 2 ranks; rank 0 has 0..2, 4..6, 8..10, ..."),
        (Layout([[], [(7, 9)]]), "7..9 on 2 ranks; rank 0 has none"),
    ],
)
def test_a_summary_tells_layouts_apart_in_words(layout: Layout, what: str) -> None:
    assert layout.summary.rpartition(" (")[0] == what
