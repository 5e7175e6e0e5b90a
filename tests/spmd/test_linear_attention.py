"""Linear attention and short convolutions on a ring of any size give the results of one device."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import ringattn as ra
from ringattn import ArgumentError, Layout, Ring, TransformError
from ringattn.verify.linear_features import LINEAR_FEATURES, linear_case
from ringattn.verify.linear_oracle import LinearCase

LAYOUTS = {
    "contiguous": Layout.contiguous,
    "zigzag": Layout.zigzag,
    "short spans": lambda n, size: Layout.cyclic(n, size, 9),
    "uneven": lambda n, size: Layout.weighted(n, range(1, size + 1)),
    "the first rank has none": lambda n, size: Layout(((), *Layout.contiguous(n, max(1, size - 1)).spans)[:size], 0),
    "later": lambda n, size: Layout.contiguous(n, size, start=7),
}
TOKENS = ("q", "k", "v", "log_decay", "beta")


def layout_of(name: str, length: int, size: int) -> Layout:
    layout = LAYOUTS[name](length, size)
    if layout.length != length:
        pytest.skip("needs two ranks")
    return layout


def local(case: LinearCase, layout: Layout, rank: int) -> dict:
    return {name: layout.shard(x, rank, axis=2) for name, x in case.tokens.items()}


def run(ring: Ring, layout: Layout, case: LinearCase, **more) -> tuple[mx.array, mx.array]:
    arrays = {**local(case, layout, ring.rank), **more}
    q, k, v = (arrays.pop(name) for name in "qkv")
    return ra.ring_linear_attention(q, k, v, ring=ring, layout=layout, state=case.state, return_state=True, **arrays)


def same_everywhere(ring: Ring, x: mx.array) -> bool:
    return bool(mx.array_equal(ring.broadcast(x, 0), x).item())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("feature", LINEAR_FEATURES)
def test_every_feature(ring: Ring, feature: str, name: str) -> None:
    case = LINEAR_FEATURES[feature]()
    layout = layout_of(name, case.q.shape[2], ring.size)
    out, state = run(ring, layout, case)
    ratios = case.ratios(out, state, layout.positions(ring.rank) - layout.start)

    assert max(ratios) <= 1, ratios
    assert same_everywhere(ring, state)
    again = run(ring, layout, case)
    assert mx.array_equal(out, again[0]).item() and mx.array_equal(state, again[1]).item()


@pytest.mark.parametrize("beta", [None, 1.0], ids=["decay", "delta rule"])
def test_bytes_do_not_depend_on_the_tokens(ring: Ring, beta: float | None) -> None:
    sent = []
    for length in (40, 400):
        case = linear_case(0, length=length, beta=beta)
        before = ring.bytes_sent
        run(ring, Layout.contiguous(length, ring.size), case)
        sent.append(ring.bytes_sent - before)
    batch, heads, v_dim, dim = case.state.shape
    transition = dim * dim if beta else 1
    own = 4 * batch * heads * (v_dim * dim + (transition if ring.rank else 0)) + 4  # and the norm of the state
    assert sent == [own * (ring.size - 1)] * 2


@pytest.mark.parametrize("lengths", [(0, 0), (1, 0), (0, 1), (3, 1)])
def test_few_tokens(ring: Ring, lengths: tuple[int, int]) -> None:
    first, second = lengths
    cuts = [(0, first), (first, first + second)]
    layout = Layout(tuple((cuts[rank],) if rank < 2 else () for rank in range(ring.size)), 0)
    case = linear_case(1, length=layout.length, beta=1.0)
    out, state = run(ring, layout, case)
    assert max(case.ratios(out, state, layout.positions(ring.rank))) <= 1


def test_decoding_continues_without_a_message(ring: Ring) -> None:
    case = linear_case(2, length=100, beta=1.0)
    prefix = LinearCase(*(x[:, :, :99] for x in (case.q, case.k, case.v, case.log_decay, case.beta)), case.state)
    _, state = run(ring, Layout.zigzag(99, ring.size), prefix)
    token = {name: getattr(case, name)[:, :, 99:] for name in TOKENS}
    before = ring.bytes_sent
    q, k, v = (token.pop(name) for name in "qkv")
    out, state = ra.linear_attention(q, k, v, state=state, return_state=True, **token)
    assert ring.bytes_sent == before
    assert max(case.ratios(out, state, slice(99, 100))) <= 1
    assert same_everywhere(ring, out)


def test_not_a_number_reaches_later_tokens_only(ring: Ring) -> None:
    case = linear_case(3, length=90, beta=1.0, forget=0.0)
    bad = np.zeros(case.v.shape[:3], bool)
    bad[:, 1, 50:] = True
    case.v = mx.where((mx.arange(90) == 50)[None, None, :, None] & mx.array([False, True, False, False])[:, None, None],
                      mx.nan, case.v)  # fmt: skip
    layout = Layout.zigzag(90, ring.size)
    out, state = run(ring, layout, case)
    found = np.isnan(np.array(out)).any(-1)
    assert np.array_equal(found, bad[:, :, layout.positions(ring.rank)])
    assert np.array_equal(np.isnan(np.array(state)).all((0, 2, 3)), [False, True, False, False])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("feature", ["linear attention, decay of channels", "gated delta rule"])
def test_gradient(ring: Ring, feature: str, name: str) -> None:
    """The gradient is that of the sum of all ranks' losses, also where a rank's loss ignores a result."""
    case = LINEAR_FEATURES[feature]()
    layout = layout_of(name, case.q.shape[2], ring.size)
    r = np.random.default_rng(5)
    weights, of_state = (mx.array(r.standard_normal(x.shape), mx.float32) for x in (case.v, case.state))
    own = layout.shard(weights, ring.rank)

    def whole(arrays: dict, state: mx.array) -> mx.array:
        q, k, v, *rest = arrays.values()
        rest = dict(zip(list(arrays)[3:], rest))
        out, state = ra.linear_attention(q, k, v, state=state, return_state=True, **rest)
        return (out * weights).sum() + (state * of_state).sum()

    def mine(arrays: dict, state: mx.array) -> mx.array:
        rest = dict(arrays)
        q, k, v = (rest.pop(name) for name in "qkv")
        out, state = ra.ring_linear_attention(q, k, v, ring=ring, layout=layout, state=state, return_state=True, **rest)
        loss = (out * own).sum()
        return loss + (state * of_state).sum() if ring.rank == ring.size - 1 else loss

    expected, expected_state = mx.grad(whole, argnums=(0, 1))(case.tokens, case.state)
    found, found_state = mx.grad(mine, argnums=(0, 1))(local(case, layout, ring.rank), case.state)
    for key, x in found.items():
        y = np.array(layout.shard(expected[key], ring.rank))
        np.testing.assert_allclose(np.array(x), y, rtol=0, atol=2e-5 * float(mx.abs(expected[key]).max()), err_msg=key)
    total = np.array(ring.all_reduce(found_state))
    np.testing.assert_allclose(total, np.array(expected_state), rtol=0, atol=2e-5 * float(mx.abs(expected_state).max()))


@pytest.mark.parametrize("argument", [*TOKENS, "state"])
def test_gradient_by_one_argument(ring: Ring, argument: str) -> None:
    """All ranks take part in it, also those whose maps do not depend on the argument."""
    case = linear_case(6, length=50, beta=1.0, dtype=mx.bfloat16)
    layout = Layout.contiguous(50, ring.size)
    arrays = local(case, layout, ring.rank)
    options = {"out_dtype": mx.float32}
    right = case.state if argument == "state" else case.tokens[argument]

    def whole(x: mx.array) -> mx.array:
        given = {**case.tokens, "state": case.state, argument: x}
        q, k, v = (given.pop(name) for name in "qkv")
        return ra.linear_attention(q, k, v, **given, **options).sum()

    def mine(x: mx.array) -> mx.array:
        given = {**arrays, "state": case.state, argument: x}
        q, k, v = (given.pop(name) for name in "qkv")
        return ra.ring_linear_attention(q, k, v, ring=ring, layout=layout, **given, **options).sum()

    expected = mx.grad(whole)(right)
    found = mx.grad(mine)(case.state if argument == "state" else arrays[argument])
    if argument == "state":
        found = ring.all_reduce(found)
    else:
        expected = layout.shard(expected, ring.rank)
    assert found.dtype == right.dtype
    assert mx.allclose(found, expected, rtol=1e-2 if right.dtype == mx.bfloat16 else 1e-4, atol=1e-4).item()


# Short convolutions


def conv_problem(rng: np.random.Generator, length: int, kernel: int, dtype: mx.Dtype) -> list[mx.array]:
    shapes = (2, length, 6), (6, kernel, 1), (6,), (2, kernel - 1, 6)
    return [mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype) for shape in shapes]


def conv_whole(x: mx.array, weight: mx.array, bias: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
    inputs = mx.concatenate([state, x], 1)
    return mx.conv1d(inputs, weight, groups=x.shape[2]) + bias, inputs[:, x.shape[1] :]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [1, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_convolution(ring: Ring, rng: np.random.Generator, name: str, kernel: int, dtype: mx.Dtype) -> None:
    layout = layout_of(name, 37, ring.size)
    x, weight, bias, state = conv_problem(rng, 37, kernel, dtype)
    expected, last = conv_whole(x, weight, bias, state)
    own = layout.shard(x, ring.rank, axis=1)
    out, after = ra.ring_short_conv(own, weight, ring=ring, layout=layout, bias=bias, state=state, return_state=True)
    assert out.dtype == dtype and after.dtype == dtype
    assert mx.allclose(out, layout.shard(expected, ring.rank, axis=1), rtol=1e-2 if dtype == mx.bfloat16 else 1e-5)
    assert mx.array_equal(after, last)
    plain = ra.ring_short_conv(own, weight, ring=ring, layout=layout)
    zeros = conv_whole(x, weight, mx.zeros_like(bias), mx.zeros_like(state))[0]
    assert mx.allclose(plain, layout.shard(zeros, ring.rank, axis=1), rtol=1e-2 if dtype == mx.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient_of_the_convolution(ring: Ring, rng: np.random.Generator, name: str) -> None:
    layout = layout_of(name, 37, ring.size)
    arrays = conv_problem(rng, 37, 4, mx.float32)
    factors = mx.array(rng.standard_normal(arrays[0].shape), mx.float32)

    def whole(*arrays: mx.array) -> mx.array:
        return (conv_whole(*arrays)[0] * factors).sum()

    def mine(x: mx.array, weight: mx.array, bias: mx.array, state: mx.array) -> mx.array:
        out = ra.ring_short_conv(x, weight, ring=ring, layout=layout, bias=bias, state=state)
        return (out * layout.shard(factors, ring.rank, axis=1)).sum()

    expected = mx.grad(whole, argnums=(0, 1, 2, 3))(*arrays)
    own = layout.shard(arrays[0], ring.rank, axis=1)
    found = mx.grad(mine, argnums=(0, 1, 2, 3))(own, *arrays[1:])
    assert mx.allclose(found[0], layout.shard(expected[0], ring.rank, axis=1), atol=1e-5)
    for part, sum_of_all in zip(found[1:], expected[1:]):
        assert mx.allclose(ring.all_reduce(part), sum_of_all, atol=1e-4)


# Wrong arguments


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"beta": None}, "beta"),
        ({"log_decay": "channel"}, "log_decay"),
        ({"scale": 0.5}, "scale"),
        ({"out_dtype": mx.float16}, "out_dtype"),
        ({"beta": "short"}, r"beta: shape \(1, 4, 2\), expected \(1, 4, "),
        ({"q": "short"}, r"k: shape .* as q"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "",
)
def test_arguments_that_differ(ring: Ring, wrong: dict, text: str) -> None:
    if ring.size == 1:
        pytest.skip("one rank")
    case = linear_case(4, length=60, beta=1.0)
    layout = Layout.contiguous(60, ring.size)
    made = dict(wrong)
    if made.get("log_decay"):
        made["log_decay"] = layout.shard(linear_case(4, length=60, decay="channel").log_decay, ring.rank)
    for name in ("beta", "q"):
        if made.get(name) == "short":
            made[name] = getattr(case, name)[:, :, :2]
    before = ring.bytes_sent
    with pytest.raises(ArgumentError, match=text):
        run(ring, layout, case, **(made if ring.rank == 1 else {}))
    assert ring.bytes_sent == before or "short" not in wrong.values()
    run(ring, layout, case)


def test_states_that_differ(ring: Ring) -> None:
    if ring.size == 1:
        pytest.skip("one rank")
    case = linear_case(4, length=60, beta=1.0)
    case.state = case.state * (2.0 if ring.rank == 1 else 1.0)
    with pytest.raises(ArgumentError, match="ring_linear_attention: states differ between ranks"):
        run(ring, Layout.contiguous(60, ring.size), case)


def test_transformations_that_are_not_supported(ring: Ring) -> None:
    case = linear_case(4, length=60, beta=1.0)
    layout = Layout.contiguous(60, ring.size)
    if ring.size == 1:
        return
    with pytest.raises(TransformError):
        mx.compile(lambda v: run(ring, layout, case, v=v)[0])(layout.shard(case.v, ring.rank))
