"""Tests of the self-test: on a Mac a kernel variant is tested before its first use, and replaced where it fails."""

from __future__ import annotations

import warnings

import mlx.core as mx
import numpy as np
import pytest
from metal_executor import restore_executor, usual_executor

import ringattn as ra
from ringattn.errors import KernelWarning
from ringattn.metal import launch, set_executor
from ringattn.verify.features import FEATURES
from ringattn.verify.oracle import ratios


@pytest.fixture
def as_on_a_mac(monkeypatch):
    """Self-test kernel variants with any executor."""
    monkeypatch.setattr(launch, "default", lambda: True)
    monkeypatch.setattr(launch, "available", lambda: True)
    monkeypatch.setattr(launch.self_test, "verdicts", {})
    yield
    restore_executor()


def worst(feature: str) -> float:
    case = FEATURES[feature]()
    out, lse = ra.attention(case.q, case.k, case.v, backend="metal", return_lse=True, **case.options)
    return max(ratios(case, out, lse))


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_passes_its_trial(as_on_a_mac, feature):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert worst(feature) <= 1
    assert all(launch.self_test.verdicts.values()) and len(launch.self_test.verdicts) == 1


def test_a_ring_hop_passes_its_trial(as_on_a_mac):
    layout = ra.Layout.zigzag(80, 1)
    x = mx.array(np.random.default_rng(0).standard_normal((1, 2, 80, 64)), mx.float32)
    with warnings.catch_warnings(), ra.init("solo") as ring:
        warnings.simplefilter("error")
        ra.ring_attention(x, x, x, ring=ring, layout=layout, mask="causal", backend="metal")
    assert list(launch.self_test.verdicts.values()) == [True]


def test_keys_in_several_runs_pass_their_trial(as_on_a_mac):
    x = mx.array(np.random.default_rng(0).standard_normal((1, 1, 1100, 64)), mx.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ra.attention(x[:, :, :1], x, x, backend="metal", sinks=mx.zeros(1))
    assert [name.endswith("keys split") for name in launch.self_test.verdicts] == [True]


def broken(call):
    raise RuntimeError("[metal::Device] Unable to build metal library from source\nprogram_source:7: error")


def wrong(call):
    return [x + 1 for x in usual_executor()(call)]


@pytest.mark.parametrize("run,what", [(broken, "Unable to build metal library"), (wrong, "its answer is wrong")])
def test_what_does_not_work_is_replaced_with_one_warning(as_on_a_mac, run, what):
    set_executor(run)
    with pytest.warns(KernelWarning, match=f"float32 to float32, head_dim 64/64, .*{what}.*ringattn verify") as warned:
        assert worst("causal") <= 1
        assert worst("causal") <= 1
    assert len(warned) == 1
