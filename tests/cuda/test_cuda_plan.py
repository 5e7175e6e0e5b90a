"""Tests of what the CUDA kernels are given, by a model of them; `tools.nvidia.check` runs the kernels themselves."""

from __future__ import annotations

import itertools

import cuda_model
import mlx.core as mx
import numpy as np
import pytest

import ringattn as ra
from ringattn import backends
from ringattn.cuda import dispatch, launch, set_executor
from ringattn.cuda.tiling import SHARED_BYTES, Tiling
from ringattn.errors import ArgumentError, ArgumentTypeError, KernelWarning
from ringattn.verify.features import FEATURES
from ringattn.verify.oracle import FLOATS, Case, check, random_case


@pytest.fixture(autouse=True)
def model(monkeypatch):
    calls = []

    def run(call):
        calls.append(call)
        return cuda_model.run(call)

    monkeypatch.setattr(launch.launcher, "executor", run)
    monkeypatch.setattr(launch.self_test, "verdicts", {})
    return calls


def attend(case: Case, **more) -> tuple[mx.array, mx.array]:
    return ra.attention(case.q, case.k, case.v, backend="cuda", return_lse=True, **case.options, **more)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature(feature: str) -> None:
    case = FEATURES[feature]()
    check(case, *attend(case))


@pytest.mark.parametrize("seed", range(30))
def test_random_problems(seed: int) -> None:
    case = random_case(seed)
    check(case, *attend(case))


@pytest.mark.parametrize("seed", range(0, 30, 3))
def test_few_queries_against_keys_in_several_runs(seed: int, model, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "LEAST_KEYS", 64)
    case = random_case(seed, q_len=3, k_len=700)
    check(case, *attend(case))
    assert [call.name.split("_")[2] for call in model] == ["forward", "combine"]


def test_a_ring_hop_continues_a_state(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "LEAST_KEYS", 64)
    for q_len in (4, 100):
        x = mx.array(np.random.default_rng(0).standard_normal((1, 2, q_len, 64)), mx.float32)
        layout = ra.Layout.zigzag(q_len, 1)
        with ra.init("solo") as ring:
            out = ra.ring_attention(x, x, x, ring=ring, layout=layout, mask="causal", backend="cuda")
        assert mx.allclose(out, ra.attention(x, x, x, mask="causal", backend="reference"), atol=1e-5)


def test_the_gradient_is_that_of_the_reference() -> None:
    q, k = (mx.array(np.random.default_rng(n).standard_normal((1, 4, 40, 64)), mx.float32) for n in (0, 1))

    def loss(q: mx.array, name: str) -> mx.array:
        return ra.attention(q, k, k, mask="causal", backend=name).square().sum()

    assert mx.allclose(mx.grad(loss)(q, "cuda"), mx.grad(loss)(q, "reference"), atol=1e-4)


def test_every_tile_fits_on_every_gpu() -> None:
    for dtype, dim, v_dim, rows in itertools.product(
        FLOATS, (8, 64, 80, 128, 136, 256), (8, 128, 256), (1, 17, 64, 999)
    ):
        tiling = Tiling.of(dtype, dim, v_dim, rows)
        assert tiling.shared_memory <= SHARED_BYTES
        assert tiling.BK % 16 == tiling.BD % 16 == tiling.BV % 16 == 0 and dim <= tiling.BD and v_dim <= tiling.BV
        assert min(rows, 32) <= tiling.BQ
        assert tiling.fragments * (tiling.BK + tiling.BV) / 2 <= 192, "sums and scores stay in registers"


def test_what_the_kernels_do_not_take_goes_to_plain_operations(model) -> None:
    for shape in ((1, 2, 5, 264), (1, 2, 0, 64)):
        x = mx.ones(shape)
        assert ra.attention(x, x, x, backend="cuda").shape == shape
    assert not model


def test_kernels_of_other_text_have_other_names(model) -> None:
    x = mx.ones((1, 2, 70, 64))
    for options in ({}, {"mask": "causal"}, {"softcap": 2.0}, {"out_dtype": mx.float16}, {"mask": mx.zeros((70, 70))}):
        mx.eval(ra.attention(x, x, x, backend="cuda", **options))
        mx.eval(ra.attention(x.astype(mx.bfloat16), *[x.astype(mx.bfloat16)] * 2, backend="cuda", **options))
    assert len({call.name for call in model}) == len({call.header for call in model}) == len(model)


# Selection


def test_the_backend_needs_an_nvidia_gpu(monkeypatch) -> None:
    monkeypatch.setattr(launch.launcher, "executor", launch.launcher.gpu)
    monkeypatch.setattr(launch, "gpu", lambda: False)
    with pytest.raises(ArgumentError, match="'cuda' needs an NVIDIA GPU.*expected 'host' or 'reference'"):
        backends.select("cuda")
    assert "cuda" not in backends.available()


def test_it_is_the_default_on_an_nvidia_gpu(monkeypatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    for gpu, name in ((True, "cuda"), (False, "reference")):
        monkeypatch.setattr(launch, "gpu", lambda gpu=gpu: gpu)
        assert backends.select(None).name == name


def test_an_executor_is_a_function() -> None:
    with pytest.raises(ArgumentTypeError, match="fn: int, expected a function"):
        set_executor(3)  # type: ignore[arg-type]


# Trials


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(launch, "default", lambda: True)
    monkeypatch.setattr(launch, "gpu", lambda: True)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_passes_its_trial(as_on_a_gpu, feature: str, recwarn) -> None:
    case = FEATURES[feature]()
    check(case, *attend(case))
    assert list(launch.self_test.verdicts.values()) == [True]
    assert not [x for x in recwarn if issubclass(x.category, KernelWarning)]


def broken(call):
    raise RuntimeError("Failed to compile kernel\nerror: identifier is undefined")


def wrong(call):
    return [x + 1 for x in cuda_model.run(call)]


@pytest.mark.parametrize("run,what", [(broken, "Failed to compile kernel"), (wrong, "its answer is wrong")])
def test_what_does_not_work_is_replaced_with_one_warning(as_on_a_gpu, monkeypatch, run, what: str) -> None:
    monkeypatch.setattr(launch.launcher, "executor", run)
    case = FEATURES["causal"]()
    with pytest.warns(KernelWarning, match=f"CUDA kernel .*float32 to float32.*{what}.*ringattn verify") as warned:
        check(case, *attend(case))
        check(case, *attend(case))
    assert len(warned) == 1
