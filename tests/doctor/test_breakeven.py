"""Break-even number of tokens: the published figures, and equal times of compute and transfer at that number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn.doctor.breakeven import AttentionModel, break_even

MAC = 17e12  # FLOP/s of attention on an M3 Ultra


@pytest.mark.parametrize(
    ("link", "tokens"),
    [(8e9, 1.1e3), (3e9, 3e3), (1.1e9, 8e3), (0.94e9 / 8, 75e3)],  # JACCL, TCP over Thunderbolt, 10 GbE, 1 GbE
)
def test_published_figures(link, tokens):
    assert break_even(MAC, link) == pytest.approx(tokens, rel=0.07)


def test_half_the_pairs_need_twice_the_tokens():
    assert break_even(MAC, 1e9) == pytest.approx(2 * break_even(MAC, 1e9, model=AttentionModel(causal=False)), abs=2)


@given(
    flops=st.floats(1e9, 1e15),
    bandwidth=st.floats(1e6, 1e11),
    latency=st.floats(0, 0.01),
    heads=st.sampled_from([(32, 8), (8, 8), (40, 1)]),
    causal=st.booleans(),
)
def test_transfer_equals_compute_there(flops, bandwidth, latency, heads, causal):
    model = AttentionModel(*heads, head_dim=64, bytes=4, causal=causal)

    def hidden(tokens):
        compute = 4 * heads[0] * 64 * tokens**2 / flops / (2 if causal else 1)
        return compute - (latency + tokens * heads[1] * (64 + 64) * 4 / bandwidth)

    tokens = break_even(flops, bandwidth, latency, model)
    assert hidden(tokens * 1.0001) >= 0
    assert tokens == 1 or hidden((tokens - 1) * 0.9999) <= 0
