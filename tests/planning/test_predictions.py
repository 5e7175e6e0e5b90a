"""The model of time and memory: limits, and what more memory, faster links and more machines must do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.core.masks import Band
from ringattn.doctor.breakeven import AttentionModel, break_even
from ringattn.errors import ArgumentError
from ringattn.planning import (
    Arrangement,
    Attending,
    Cluster,
    Job,
    Link,
    Machine,
    ModelShape,
    best,
    parse_link,
    parse_machines,
    predictions,
    prefill,
)
from ringattn.planning.choice import arrangements
from ringattn.planning.demand import pass_kv
from ringattn.planning.hops import Ring, call_timing
from ringattn.planning.links import LINKS
from ringattn.planning.machines import CHIPS
from ringattn.planning.prefill import read_on_ring, read_through_pipeline
from ringattn.planning.shape import LAST, attention_shape
from ringattn.ring.schedule import Sizes

MODEL = ModelShape(  # a Llama of 8 billion parameters, quantised
    "llama",
    32,
    (Attending(32, 4.0 * 32 * 128, 4096, Sizes(8192, 16640), 8),),
    hidden=8192,
    linear=1.4e10,
    divided=4 << 30,
    whole=1 << 30,
    read=4 << 30,
    head=1 << 29,
    heads=32,
    activations=180_000,
    can_divide=True,
)
MACHINE = Machine("m", 1e13, 9e12, 4e11, 64 << 30)
LINK = Link("l", 1e9, 1e-4)
RATES = st.floats(1e6, 1e11)
SIZES = st.sampled_from([1, 2, 3, 4, 6, 8])
TOKENS = st.integers(1, 300_000)


def cluster(size: int, link: Link = LINK, **options) -> Cluster:
    return Cluster((MACHINE,) * size, link, **options)


def seconds(where: Cluster, job: Job, shape: ModelShape = MODEL) -> dict[Arrangement, float]:
    return {one.arrangement: one.seconds(job.answer) for one in predictions(shape, where, job)}


@settings(deadline=None, max_examples=40)
@given(SIZES, TOKENS, RATES, st.floats(1.0, 10.0), st.floats(0.0, 1.0))
def test_a_faster_link_is_never_slower(size: int, tokens: int, rate: float, more: float, less: float) -> None:
    job = Job(tokens)
    slow = seconds(cluster(size, Link("slow", rate, 1e-3)), job)
    fast = seconds(cluster(size, Link("fast", rate * more, 1e-3 * less)), job)
    for arrangement, time in slow.items():
        assert fast[arrangement] <= time * (1 + 1e-9), arrangement


@settings(deadline=None, max_examples=40)
@given(SIZES, TOKENS, st.integers(0, 1 << 36), st.integers(0, 1 << 36))
def test_more_memory_never_fits_less(size: int, tokens: int, memory: int, more: int) -> None:
    found = []
    for bytes_ in (memory, memory + more):
        machines = (replace(MACHINE, memory=float(bytes_)),) * size
        found.append({one.arrangement: one for one in predictions(MODEL, Cluster(machines, LINK), Job(tokens))})
    for arrangement, one in found[0].items():
        assert one.longest <= found[1][arrangement].longest
        assert not one.fits or found[1][arrangement].fits


@settings(deadline=None, max_examples=30)
@given(SIZES, TOKENS, st.integers(1, 100_000))
def test_a_longer_context_takes_more_time_and_memory(size: int, tokens: int, more: int) -> None:
    short, long = (
        {one.arrangement: one for one in predictions(MODEL, cluster(size), Job(n, chunk=512))}
        for n in (tokens, tokens + more)
    )
    for arrangement, one in short.items():
        assert one.memory <= long[arrangement].memory
        if tokens > 512 * size:  # short prompts go through other code: all ranks compute all of a few tokens
            assert one.first <= long[arrangement].first * 1.001, arrangement


@settings(deadline=None, max_examples=40)
@given(SIZES, TOKENS)
def test_the_longest_context_fits_and_one_more_does_not(size: int, tokens: int) -> None:
    for one in predictions(MODEL, cluster(size), Job(tokens)):
        assert one.fits == (tokens <= one.longest), one


def test_a_ring_without_links_is_as_fast_as_its_work_divided() -> None:
    free = Link("free", 1e18, 0.0)
    for size in (2, 4, 8):
        alone = read_on_ring(MODEL, [MACHINE], [free], 1 << 16, 8192, [1.0])
        ring = read_on_ring(MODEL, [MACHINE] * size, [free] * size, 1 << 16, 8192, [1.0] * size)
        assert ring.seconds == pytest.approx(alone.seconds / size, rel=0.02)
        assert ring.hidden > 0.99


@pytest.mark.parametrize("tokens", [1 << 20, (1 << 20) + 700])
def test_many_rounds_take_as_long_as_their_samples(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    where = ([MACHINE] * 2, [LINK] * 2, tokens, 1024, [1.0] * 2)
    few = read_on_ring(MODEL, *where)
    prefill_samples = prefill.SAMPLES
    monkeypatch.setattr(prefill, "SAMPLES", tokens)
    all_rounds = read_on_ring(MODEL, *where)
    assert few.seconds == pytest.approx(all_rounds.seconds, rel=1e-3)
    for name in ("transfer", "sent"):  # within one sample the strategy changes
        assert getattr(few, name) == pytest.approx(getattr(all_rounds, name), rel=1 / prefill_samples)
    assert few.hidden == pytest.approx(all_rounds.hidden, abs=0.01)


def test_the_work_of_a_prompt() -> None:
    """One rank computes each pair once, but for the last layer's, however many rounds there are."""
    free = Link("free", 1e18, 0.0)
    n = 1 << 14
    pairs = n * (n + 1) / 2 * 31 * 4.0 * 32 * 128
    expected = MODEL.linear * (31 + LAST) / 32 * n / MACHINE.flops + pairs / MACHINE.attention
    for chunk in (512, 3000, n):
        assert read_on_ring(MODEL, [MACHINE], [free], n, chunk, [1.0]).seconds == pytest.approx(expected, rel=1e-6)
        assert read_through_pipeline(MODEL, [MACHINE], [free], n, chunk, [1.0]).seconds == pytest.approx(expected)


def test_the_first_stage_of_a_pipeline_computes_all_of_its_layers() -> None:
    """And the last one little of its last layer, so that the first one is the slowest."""
    free = Link("free", 1e18, 0.0)
    n = 1 << 14
    few = replace(MODEL, depth=4, linear=MODEL.linear / 8, attending=(replace(MODEL.attending[0], count=4),))
    pairs = n * (n + 1) / 2 * 4 * 4.0 * 32 * 128
    first = 0.5 * (few.linear * n / MACHINE.flops + pairs / MACHINE.attention)
    found = read_through_pipeline(few, [MACHINE] * 2, [free] * 2, n, 256, [0.5, 0.5])
    assert first < found.seconds < 1.03 * first  # and the last chunk passes the second stage


def test_layers_with_a_window_cost_what_it_reaches() -> None:
    free = Link("free", 1e18, 0.0)
    kind = replace(MODEL.attending[0], window=1024)
    windowed = replace(MODEL, attending=(kind,), linear=0.0)
    n = 1 << 14
    pairs = sum(min(i + 1, 1024) for i in range(n))
    found = read_on_ring(windowed, [MACHINE], [free], n, 4096, [1.0]).seconds
    assert found == pytest.approx(pairs * 31 * kind.pair_flops / MACHINE.attention, rel=1e-6)


def test_a_hop_hides_from_the_break_even_on() -> None:
    """The doctor's break-even and the simulated hops say the same."""
    model = AttentionModel(causal=False)
    tokens = break_even(9e12, 1e9, 0.0, model)
    ring = Ring(np.full(4, 9e12), 0.0, (Link("l", 1e9, 0.0),) * 4)
    sizes = Sizes(model.bytes_per_token)
    for local, waits in ((tokens // 2, True), (tokens + 1, False)):
        spans = [((rank * local, (rank + 1) * local),) for rank in range(4)]
        timing = call_timing(ring, pass_kv(spans, spans, Band()), sizes, model.flops_per_pair)
        assert (timing.finish.max() > timing.compute.max() * 1.0001) == waits


def test_transfers_bound_a_slow_ring() -> None:
    """Where links are slow, a call takes the time of the blocks that pass a link."""
    ring = Ring(np.full(3, 1e15), 0.0, (Link("l", 1e6, 1e-3),) * 3)
    spans = [((rank * 100, rank * 100 + 100),) for rank in range(3)]
    timing = call_timing(ring, pass_kv(spans, spans, Band()), Sizes(10), 1.0)
    assert timing.finish == pytest.approx(2 * (100 * 10 / 1e6 + 1e-3), rel=1e-3)


def test_the_arrangements() -> None:
    names = [str(one) for one in arrangements(MODEL, cluster(4))]
    assert names == ["ring of 4", "grid of 2 rows of 2", "tensor parallel, 4", "pipeline of 4"]
    assert [str(one) for one in arrangements(MODEL, cluster(1))] == ["one machine"]
    assert [str(one) for one in arrangements(attention_shape(8, 2, 64, 2), cluster(3))] == ["ring of 3"]
    islands = list(arrangements(MODEL, cluster(16, island=4, outer=LINK)))
    assert Arrangement(ring=4, groups=4) in islands and Arrangement(tensor=8, ring=2) not in islands
    assert all(one.machines == 16 for one in islands)


def test_rows_divide_heads() -> None:
    assert MODEL.tensor_sizes(24) == [1, 2, 4, 8]
    assert replace(MODEL, can_divide=False).tensor_sizes(8) == [1]


def test_a_link_between_islands_slows_the_ring_that_crosses_it() -> None:
    near = cluster(8, island=4, outer=LINK)
    far = cluster(8, island=4, outer=Link("far", 1e7, 1e-3))
    job = Job(100_000)
    assert seconds(far, job)[Arrangement(ring=8)] > seconds(near, job)[Arrangement(ring=8)]


def test_where_links_are_slow_the_pipeline_wins_and_where_they_are_fast_the_ring() -> None:
    job = Job(65_536)
    slow = best(predictions(MODEL, cluster(4, LINKS["1gbe"]), job), job.answer)
    fast = best(predictions(MODEL, cluster(4, LINKS["tb5-rdma"]), job), job.answer)
    assert slow is not None and slow.arrangement.kind == "pipeline"
    assert fast is not None and fast.arrangement.kind in ("ring", "grid")


def test_unequal_machines_get_unequal_shares() -> None:
    machines = (MACHINE, replace(MACHINE, flops=MACHINE.flops / 2, attention=MACHINE.attention / 2))
    job = Job(65_536)
    ring = next(one for one in predictions(MODEL, Cluster(machines, LINK), job) if one.arrangement.kind == "ring")
    assert ring.weights[0] == pytest.approx(2 * ring.weights[1], rel=0.03)


def test_a_small_machine_gets_what_fits() -> None:
    """A fast machine with little memory holds less of the context than its speed would give it."""
    small = replace(MACHINE, flops=4 * MACHINE.flops, attention=4 * MACHINE.attention, memory=12.0 * (1 << 30))
    (ring,) = (
        one
        for one in predictions(MODEL, Cluster((small, MACHINE), LINK), Job(150_000, chunk=512))
        if one.arrangement.kind == "ring"
    )
    assert ring.fits and ring.weights[0] < ring.weights[1]


def test_nothing_fits() -> None:
    where = Cluster((replace(MACHINE, memory=1.0 * (1 << 30)),), LINK)
    found = predictions(MODEL, where, Job(1000))
    assert best(found, 1) is None and found[0].longest == 0


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([1, 16, 64, 256, 1024]))
def test_up_to_a_thousand_machines(size: int) -> None:
    found = predictions(attention_shape(32, 8, 128, 2), cluster(size), Job(1 << 20))
    assert all(np.isfinite(one.first) and one.first > 0 for one in found)


def test_machines_from_text() -> None:
    assert [m.name for m in parse_machines(["2*M3-Ultra:256G"])] == ["m3-ultra"] * 2
    given = parse_machines(["17.4/800:96G"])[0]
    assert (given.flops, given.bandwidth, given.memory) == (pytest.approx(17.4e12), 800e9, 96 << 30)
    assert all(parse_machines([name])[0].memory > 1 << 30 for name in CHIPS)


@pytest.mark.parametrize(
    "text", ["", "m9", "0*m4", "2000*m4", "m4:12X", "17/800", "0/3:1G", "a*b*c", "m4:1G:2G", "-1*m4"]
)
def test_wrong_machines(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"^--machine[^\n]*expected[^\n]*$"):
        parse_machines([text])


def test_links_from_text() -> None:
    assert parse_link("--link", "TB5-RDMA") is LINKS["tb5-rdma"]
    found = parse_link("--link", "3.2/300")
    assert (found.bandwidth, found.latency) == (3.2e9, pytest.approx(300e-6))


@pytest.mark.parametrize("text", ["", "tb6", "3.2", "0/1", "1/2/3", "-1/2", "nan/1"])
def test_wrong_links(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"^--link: [^\n]*expected[^\n]*tb5-rdma"):
        parse_link("--link", text)


@pytest.mark.parametrize("size", [2, 4])
def test_cpus_divide_a_large_output_layer(size: int) -> None:
    free = Link("free", 1e18, 0.0)

    def token(shape: ModelShape, gpu: bool) -> float:
        found = predictions(shape, cluster(size, free), Job(8, gpu=gpu))
        return next(one.token for one in found if one.arrangement == Arrangement(size))

    saved = MODEL.head * (1 - 1 / size) / MACHINE.bandwidth
    assert token(MODEL, True) - token(MODEL, False) == pytest.approx(saved, abs=2e-5)
    small = replace(MODEL, head=1 << 20)
    assert token(small, True) == token(small, False)
