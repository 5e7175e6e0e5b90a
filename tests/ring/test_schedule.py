"""Tests of the schedule and the band, against masks of single pairs and paths of single tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Layout
from ringattn.core.intervals import halves, length, union
from ringattn.core.masks import Band, Tile
from ringattn.ring.schedule import (
    BOTH_WAYS,
    HALVED_BYTES,
    STRATEGIES,
    TO_THE_RIGHT,
    Route,
    Schedule,
    Sizes,
    choose,
    choose_routes,
    minimum,
    plan,
    traffic,
)

steady = settings(deadline=None, derandomize=True, max_examples=120)

BANDS = [
    (False, None),
    (True, None),
    *((causal, window) for causal in (False, True) for window in (1, 2, 7, (0, 0), (3, 0), (0, 4), (5, 2), (60, 60))),
]


def attends(i: int, j: int, causal: bool, window: int | tuple[int, int] | None) -> bool:
    """Return whether the query at position i sees the key at position j, by the documentation alone."""
    if causal and j > i:
        return False
    if isinstance(window, int):
        return 0 <= i - j < window
    return window is None or (i - j <= window[0] if j <= i else j - i <= window[1])


@dataclass(frozen=True)
class Problem:
    """Layouts of queries and keys, and the band."""

    q_layout: Layout
    kv_layout: Layout
    causal: bool
    window: int | tuple[int, int] | None

    @property
    def size(self) -> int:
        return self.q_layout.size

    @property
    def band(self) -> Band:
        return Band.of(self.causal, self.window)

    def pairs(self) -> set[tuple[int, int]]:
        """List all attending pairs (query, key)."""
        queries, keys = (range(x.start, x.stop) for x in (self.q_layout, self.kv_layout))
        return {(i, j) for i in queries for j in keys if attends(i, j, self.causal, self.window)}

    def plans(self, strategy: str, route: Route = TO_THE_RIGHT) -> list[Schedule]:
        ranks = range(self.size)
        return [plan(self.q_layout, self.kv_layout, self.band, strategy, rank, route=route) for rank in ranks]

    def travelling(self, strategy: str) -> Layout:
        return self.q_layout if strategy == "pass_q" else self.kv_layout

    def on(self, route: Route, strategy: str, rank: int) -> set[int]:
        """Select the tokens of a rank that use a route."""
        return tokens(route.tokens(self.travelling(strategy).spans[rank]))

    def met(self, strategy: str) -> dict[int, set[int]]:
        """Find, for every travelling token, the ranks that hold a token with which it forms an attending pair."""
        q_owner, k_owner = owners(self.q_layout), owners(self.kv_layout)
        found: dict[int, set[int]] = {p: set() for p in owners(self.travelling(strategy))}
        for i, j in self.pairs():
            if strategy == "pass_q":
                found[i].add(k_owner[j])
            else:
                found[j].add(q_owner[i])
        return found


def owners(layout: Layout) -> dict[int, int]:
    return {p: rank for rank in range(layout.size) for p in layout.positions(rank).tolist()}


def tokens(spans: tuple) -> set[int]:
    """List the positions in `spans`, which must be ascending and disjoint."""
    listed = [p for start, stop in spans for p in range(start, stop)]
    assert listed == sorted(set(listed))
    return set(listed)


def hop_of(schedule: Schedule, h: int, name: str) -> set[int]:
    """List the positions in one field of hop `h`. Hops left out at the end are empty."""
    return tokens(getattr(schedule.hops[h], name)) if h < len(schedule.hops) else set()


def make_layout(draw: st.DrawFn, n: int, size: int, start: int) -> Layout:
    kind = draw(st.sampled_from(["contiguous", "zigzag", "cyclic", "weighted", "scattered", "one rank"]))
    if kind == "cyclic":
        return Layout.cyclic(n, size, draw(st.integers(1, 6)), start=start)
    if kind == "weighted":
        weights = st.lists(st.sampled_from([0, 1, 2.5]), min_size=size, max_size=size).filter(any)
        return Layout.weighted(n, draw(weights), start=start)
    if kind in ("scattered", "one rank"):
        only = draw(st.integers(0, size - 1))
        at = [only] * n if kind == "one rank" else draw(st.lists(st.integers(0, size - 1), min_size=n, max_size=n))
        return Layout([[(start + i, start + i + 1) for i in range(n) if at[i] == r] for r in range(size)], start)
    return getattr(Layout, kind)(n, size, start=start)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Draw layouts of queries and keys (equal, new queries after a cached prefix, or any) and a band."""
    size, start = draw(st.integers(1, 9)), draw(st.integers(0, 20))
    q_layout = make_layout(draw, draw(st.integers(0, 40)), size, start)
    relation = draw(st.sampled_from(["same", "prefix", "any"]))
    kv_layout = q_layout
    if relation == "prefix":
        kv_layout = make_layout(draw, start, size, 0).extend(q_layout)
    elif relation == "any":
        kv_layout = make_layout(draw, draw(st.integers(0, 40)), size, draw(st.integers(0, 20)))
    return Problem(q_layout, kv_layout, *draw(st.sampled_from(BANDS)))


every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_route = pytest.mark.parametrize("route", [TO_THE_RIGHT, *BOTH_WAYS], ids=["all", "right half", "left half"])


# (a) computed pairs


@every_strategy
@pytest.mark.parametrize("routes", [(TO_THE_RIGHT,), BOTH_WAYS], ids=["one way", "both ways"])
@steady
@given(problem=problems())
def test_every_pair_is_computed_exactly_once(strategy, routes, problem):
    computed: Counter = Counter()
    for rank, schedule in (one for route in routes for one in enumerate(problem.plans(strategy, route))):
        stays = (problem.kv_layout if strategy == "pass_q" else problem.q_layout).positions(rank).tolist()
        for hop in schedule.hops:
            assert tokens(hop.compute) <= tokens(hop.held)
            assert tokens(hop.held) <= set(problem.travelling(strategy).positions(hop.source).tolist())
            for moving in tokens(hop.compute):
                met = [(moving, x) if strategy == "pass_q" else (x, moving) for x in stays]
                met = [(i, j) for i, j in met if attends(i, j, problem.causal, problem.window)]
                assert met, f"{moving=} is computed on rank {rank} and meets nothing there"
                computed.update(met)
    assert set(computed) == problem.pairs()
    assert set(computed.values()) <= {1}


# (b) sent tokens


@every_strategy
@every_route
@steady
@given(problem=problems())
def test_what_arrives_is_what_the_rank_before_sends(strategy, route, problem):
    plans = problem.plans(strategy, route)
    for rank, schedule in enumerate(plans):
        before = plans[(rank - route.step) % problem.size]
        assert hop_of(schedule, 0, "held") == set(problem.travelling(strategy).positions(rank).tolist())
        assert hop_of(schedule, 0, "returning") == hop_of(schedule, 0, "state") == set()
        for h in range(1, problem.size):
            assert hop_of(schedule, h, "held") == hop_of(before, h - 1, "send")
            assert hop_of(schedule, h, "returning") == hop_of(before, h - 1, "state")
        assert len(schedule.hops) <= problem.size
        assert hop_of(schedule, problem.size - 1, "send") == set(), "the last hop sends no block"
        assert tokens(schedule.home) == (hop_of(before, problem.size - 1, "state") if problem.size > 1 else set())
        assert all(hop.source == (rank - route.step * h) % problem.size for h, hop in enumerate(schedule.hops))
        assert schedule.step == route.step


# (c) no token travels further than needed


@every_strategy
@every_route
@steady
@given(problem=problems())
def test_a_token_travels_to_the_last_rank_that_needs_it(strategy, route, problem):
    met = problem.met(strategy)
    for rank, schedule in enumerate(problem.plans(strategy, route)):
        for h, hop in enumerate(schedule.hops):
            further = {(rank + route.step * x) % problem.size for x in range(1, problem.size - h)}
            own = problem.on(route, strategy, hop.source)
            assert tokens(hop.send) == {p for p in own if met[p] & further}


# (d) no idle hops at the end


@every_strategy
@every_route
@steady
@given(problem=problems())
def test_nothing_is_left_of_hops_in_which_nothing_happens(strategy, route, problem):
    for schedule in problem.plans(strategy, route):
        last = schedule.hops[-1]
        assert len(schedule.hops) == 1 or last.held or last.returning


# (e)


@every_strategy
@pytest.mark.parametrize("size", [1, 2, 5, 9])
@pytest.mark.parametrize("window", [1, 2, 8, 9, 10, 17, 25, 1000])
def test_a_window_ends_the_ring_early(strategy, size, window):
    """With contiguous blocks of 8, a query sees window - 1 tokens back. Only ranks that near need a block."""
    layout, reach = Layout.contiguous(8 * size, size), -(-(window - 1) // 8)
    for rank in range(size):
        hops = plan(layout, layout, Band.of(False, window), strategy, rank).hops
        if strategy == "pass_q":  # queries see back, so they travel around nearly the whole ring
            busy = [h for h in range(1, size) if hops[h : h + 1] and hops[h].compute]
            assert busy == [h for h in range(1, size) if 0 < (size - h) <= reach and rank + size - h < size]
        else:
            assert len(hops) == 1 + min(rank, reach)


# (f)


@pytest.mark.parametrize("size", range(1, 10))
@pytest.mark.parametrize("chunk", [1, 3])
def test_zigzag_has_equal_causal_work_at_every_hop(size, chunk):
    problem = Problem(layout := Layout.zigzag(2 * size * chunk, size), layout, True, None)
    plans = problem.plans("pass_kv")
    for h in range(size):
        work = set()
        for rank, schedule in enumerate(plans):
            keys, queries = hop_of(schedule, h, "compute"), layout.positions(rank).tolist()
            work.add(sum(attends(i, j, True, None) for i in queries for j in keys))
        assert work == {2 * chunk**2 if h else chunk * (chunk + 1) + chunk**2}


@pytest.mark.parametrize("size", range(3, 10))
def test_zigzag_has_equal_work_at_every_hop_both_ways_too(size):
    problem = Problem(layout := Layout.zigzag(4 * size, size), layout, True, None)
    routes = [problem.plans("pass_kv", route) for route in BOTH_WAYS]
    for h in range(1, size):
        work = set()
        for rank, schedules in enumerate(zip(*routes)):
            keys = set().union(*(hop_of(schedule, h, "compute") for schedule in schedules))
            work.add(sum(attends(i, j, True, None) for i in layout.positions(rank).tolist() for j in keys))
        assert work == {8}


@steady
@given(problems())
def test_halves(problem):
    """Every span is halved, so that zigzag stays even. The halves together are the whole."""
    for spans in problem.kv_layout.spans:
        one, other = halves(spans)
        assert union((*one, *other)) == spans and length(one) + length(other) == length(spans)
        assert 0 <= length(one) - length(other) <= 1
        for start, stop in spans:
            inside = [length(tuple(s for s in half if start <= s[0] < stop)) for half in (one, other)]
            assert abs(inside[0] - inside[1]) <= 1


# (g) the states of pass-Q


@every_route
@steady
@given(problem=problems())
def test_states_follow_their_queries_from_the_first_rank_that_adds(route, problem):
    met, size = problem.met("pass_q"), problem.size
    for rank, schedule in enumerate(problem.plans("pass_q", route)):
        assert tokens(schedule.home) == {p for p in problem.on(route, "pass_q", rank) if met[p] - {rank}}
        own = set(problem.q_layout.positions(rank).tolist())
        assert tokens(schedule.own) == (own if route.first else tokens(schedule.home))
        for h, hop in enumerate(schedule.hops):
            so_far = {(hop.source + route.step * x) % size for x in range(1, h + 1)}
            rows = problem.on(route, "pass_q", hop.source)
            assert tokens(hop.state) == {p for p in rows if met[p] & so_far}
            if h:
                assert tokens(hop.state) == tokens(hop.returning) | tokens(hop.compute)


@steady
@given(problems())
def test_only_pass_q_moves_states(problem):
    for strategy in ("pass_kv", "gather"):
        for schedule in problem.plans(strategy):
            assert schedule.home == () and all(hop.state == hop.returning == () for hop in schedule.hops)


@steady
@given(problems())
def test_in_the_gradient_keys_travel_as_queries_do(problem):
    """Gradients follow keys as results follow queries in pass-Q, with the roles exchanged."""
    band, transposed = problem.band, problem.band.transposed
    for rank in range(problem.size):
        forward = plan(problem.q_layout, problem.kv_layout, band, "pass_kv", rank)
        keys = plan(problem.q_layout, problem.kv_layout, band, "pass_kv", rank, gradient=True)
        assert keys == plan(problem.kv_layout, problem.q_layout, transposed, "pass_q", rank)
        for before, hop in zip(forward.hops, keys.hops):
            assert before == replace(hop, state=(), returning=())
        queries = plan(problem.q_layout, problem.kv_layout, band, "pass_q", rank)
        assert queries == plan(problem.q_layout, problem.kv_layout, band, "pass_q", rank, gradient=True)


# (h) the choice of the strategy


def journeys(problem: Problem, strategy: str) -> tuple[int, int]:
    """Count the hops of all blocks and all states, token by token."""
    owner, size = owners(problem.travelling(strategy)), problem.size
    blocks = states = 0
    for token, ranks in problem.met(strategy).items():
        distances = [(rank - owner[token]) % size for rank in ranks if rank != owner[token]]
        blocks += max(distances, default=0)
        states += size - min(distances, default=size)
    return blocks, states if strategy == "pass_q" else 0


@every_strategy
@steady
@given(problem=problems())
def test_traffic(strategy, problem):
    told = traffic(problem.q_layout, problem.kv_layout, problem.band, strategy)
    assert (told.blocks, told.results) == journeys(problem, strategy)
    sends = [len(tokens(hop.send)) for schedule in problem.plans(strategy) for hop in schedule.hops]
    assert told.largest_block == max(sends)


@steady
@given(problems())
def test_minimum(problem):
    owner = owners(problem.kv_layout)
    fewest = sum(len(ranks - {owner[key]}) for key, ranks in problem.met("pass_kv").items())
    assert minimum(problem.q_layout, problem.kv_layout, problem.band) == fewest
    assert fewest <= traffic(problem.q_layout, problem.kv_layout, problem.band, "pass_kv").blocks


def copy(layout: Layout) -> Layout:
    """Copy a layout: an equal one that is another object, as on another rank."""
    return Layout([[list(span) for span in spans] for spans in layout.spans], layout.start)


@steady
@given(problems(), st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_choose_takes_the_fewer_bytes(problem, key_bytes, query_bytes, state_bytes):
    sizes = Sizes(key_bytes), Sizes(query_bytes, state_bytes)
    chosen = choose(problem.q_layout, problem.kv_layout, problem.band, *sizes)
    keys, (queries, states) = journeys(problem, "pass_kv")[0], journeys(problem, "pass_q")
    saves = queries * query_bytes + states * state_bytes < keys * key_bytes
    assert chosen in ("pass_kv", "pass_q")
    assert saves or chosen == "pass_kv"
    choose.cache_clear()
    others = choose(copy(problem.q_layout), copy(problem.kv_layout), Band.of(problem.causal, problem.window), *sizes)
    assert others == chosen, "ranks that were given equal things come to the same choice"


def model_bytes(q_heads: int, kv_heads: int, dim: int = 128, item: int = 2) -> tuple[Sizes, Sizes]:
    """Compute the bytes of a key with its value, and of a query with its state, of a model."""
    return Sizes(2 * kv_heads * dim * item), Sizes(q_heads * dim * item, q_heads * (dim + 2) * 4)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_few_queries_against_a_long_prefix_pass_q(size):
    prefix, new = 32_768, 16 * size
    q_layout = Layout.contiguous(new, size, start=prefix)
    kv_layout = Layout.zigzag(prefix, size).extend(q_layout)
    assert choose(q_layout, kv_layout, Band.of(True, None), *model_bytes(32, 8)) == "pass_q"


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("kind", [Layout.contiguous, Layout.zigzag])
def test_a_whole_prompt_with_grouped_heads_passes_kv(size, kind):
    layout = kind(32_768, size)
    assert choose(layout, layout, Band.of(True, None), *model_bytes(32, 8)) == "pass_kv"


def test_choose_minds_memory():
    """Pass-Q with fewer bytes is not chosen where its queries and states need more memory than two key blocks."""
    prefix, size = 4096, 8
    kv_only_far = Layout([[(0, prefix)]] + [[]] * (size - 1))
    q_layout = Layout([[]] * (size - 1) + [[(prefix, prefix + 600)]], prefix)
    kv_layout = kv_only_far.extend(q_layout)
    far_keys, queries = traffic(q_layout, kv_layout, Band(), "pass_kv"), traffic(q_layout, kv_layout, Band(), "pass_q")
    key, query, state = 40, 10, 150
    assert queries.blocks * query + queries.results * state < far_keys.blocks * key
    assert queries.largest_block * (2 * query + 3 * state) <= 2 * far_keys.largest_block * key
    assert choose(q_layout, kv_layout, Band(), Sizes(key), Sizes(query, state)) == "pass_q"
    assert choose(q_layout, kv_layout, Band(), Sizes(key), Sizes(query, 200)) == "pass_kv"
    assert queries.blocks * query + queries.results * 200 < far_keys.blocks * key, "though it would move fewer bytes"


KEY = Sizes(2 * 8 * 128 * 2)


@pytest.mark.parametrize("size", [3, 4, 8])
@pytest.mark.parametrize(
    ("kind", "causal"), [(Layout.zigzag, True), (Layout.zigzag, False), (Layout.contiguous, False)]
)
def test_both_ways_where_all_need_all(size, kind, causal):
    tokens = 2 * size * -(-HALVED_BYTES // KEY.block)
    for n, expected in ((tokens, BOTH_WAYS), (tokens // 4, (TO_THE_RIGHT,))):
        layout = kind(n, size)
        assert choose_routes(layout, layout, Band.of(causal, None), "pass_kv", KEY) == expected


@pytest.mark.parametrize("size", [3, 4, 8])
@pytest.mark.parametrize("window", [None, 1000])
def test_one_way_where_the_left_neighbour_needs_it_last(size, window):
    layout = Layout.contiguous(4096 * size, size)
    assert choose_routes(layout, layout, Band.of(True, window), "pass_kv", KEY) == (TO_THE_RIGHT,)


# (i) the band

bands = st.sampled_from(BANDS)
edges = st.tuples(st.integers(-12, 12), st.integers(0, 9)).map(lambda x: (x[0], x[0] + x[1]))


def rectangle(q: tuple[int, int], keys, causal, window) -> np.ndarray:
    return np.array([[attends(i, int(j), causal, window) for j in keys] for i in range(q[0], q[1] + 1)], bool)


@steady
@given(bands, edges, edges)
def test_tile(rules, q, k):
    seen = rectangle(q, range(k[0], k[1] + 1), *rules)
    expected = Tile.FULL if seen.all() else Tile.PARTIAL if seen.any() else Tile.EMPTY
    assert Band.of(*rules).tile(*q, *k) is expected


@steady
@given(bands, edges, st.lists(st.integers(-25, 25), max_size=30).map(sorted))
def test_runs(rules, q, keys):
    seen = rectangle(q, keys, *rules)
    runs = list(Band.of(*rules).runs(*q, np.array(keys, np.int32)))
    assert "".join(tile.name[0] for _, _, tile in runs) in ("", "P", "F", "PF", "FP", "PFP")
    at = 0
    for start, stop, tile in runs:
        assert at <= start < stop <= len(keys)
        assert not seen[:, at:start].any(), "what lies outside of the runs is empty"
        assert seen[:, start:stop].all() if tile is Tile.FULL else seen[:, start:stop].any(axis=0).all()
        assert tile is Tile.FULL or not seen[:, start:stop].all(axis=0).any(), "a full key is in no partial run"
        at = stop
    assert not seen[:, at:].any()


@steady
@given(bands, st.lists(st.integers(-25, 25), max_size=9), st.lists(st.integers(-25, 25), max_size=9))
def test_visible(rules, queries, keys):
    seen = Band.of(*rules).visible(np.array(queries, np.int32), np.array(keys, np.int32))
    assert seen.shape == (len(queries), len(keys)) and seen.dtype == bool
    assert seen.tolist() == [[attends(i, j, *rules) for j in keys] for i in queries]


@steady
@given(bands, edges, edges)
def test_transposed_swaps_queries_and_keys(rules, q, k):
    band, queries, keys = Band.of(*rules), np.arange(*q), np.arange(*k)
    np.testing.assert_array_equal(band.transposed.visible(keys, queries), band.visible(queries, keys).T)


def test_visible_at_the_ends_of_int32():
    ends = np.array([-(2**31), -1, 0, 2**31 - 1], np.int32)
    for rules in [(True, None), (False, 2**31 - 1), (True, (2**31 - 1, 2**31 - 1)), (False, (2**32, 0))]:
        expected = [[attends(i, j, *rules) for j in ends.tolist()] for i in ends.tolist()]
        assert Band.of(*rules).visible(ends, ends).tolist() == expected


@pytest.mark.parametrize("a", Tile)
@pytest.mark.parametrize("b", Tile)
def test_tiles_combine_by_and(a, b):
    assert (a & b) is min(a, b, key=lambda tile: tile.value)
    assert (a & Tile.EMPTY) is Tile.EMPTY and (a & Tile.FULL) is a
