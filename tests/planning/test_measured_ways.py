"""Ways to divide a model that were measured on two hosts and 1 Gbit/s, predicted from the times of one host.

4 layers with the shapes of Qwen2.5-1.5B in float32, a core a host, chunks of 512 tokens a rank: benchmarks.rivals job.
"""

from __future__ import annotations

import os

import pytest

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from benchmarks.rivals import computed
from benchmarks.rivals.job import LARGER, OURS
from benchmarks.rivals.results import JobRow
from ringattn.planning import Cluster, Job, Link, Machine, ModelShape, predictions

GBIT = Link("1 Gbit/s", 0.94e9 / 8, 1e-4)
ALONE = {2048: 8.2, 16384: 91.4}  # s of the first token on one host
TOKEN = 0.241  # s after the short prompt
MEASURED = {  # s of the first token
    2048: {"tensor": 4.9, "pipeline": 6.0, "ring": 4.4},
    8192: {"tensor": 21.6, "pipeline": 24.9, "ring": 19.7},
    16384: {"tensor": 51.6, "pipeline": 57.9, "ring": 48.8},
}


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return computed.shape(4)


@pytest.fixture(scope="module")
def host() -> Machine:
    kind = ("1gbit", LARGER, "mlx-lm, one host", OURS)
    return computed.host([JobRow(*kind, prompt, [first], [TOKEN], 0.0, 0.0, 0.0) for prompt, first in ALONE.items()])


@pytest.mark.parametrize("prompt", MEASURED)
def test_the_first_token_of_each_way(prompt: int, shape: ModelShape, host: Machine) -> None:
    job = Job(prompt, answer=1, chunk=512, pipeline_chunk=512, gpu=False)
    found = predictions(shape, Cluster((host, host), GBIT), job)
    assert {one.arrangement.kind: one.first for one in found} == pytest.approx(MEASURED[prompt], rel=0.07)
    assert found[0].arrangement.kind == min(MEASURED[prompt], key=MEASURED[prompt].get) == "ring"


def test_a_pipeline_is_recommended_on_a_slow_link(shape: ModelShape, host: Machine) -> None:
    slow = Link("50 Mbit/s", 0.47e8 / 8, 1e-4)
    found = predictions(shape, Cluster((host, host), slow), Job(16384, answer=1, chunk=512, gpu=False))
    assert found[0].arrangement.kind == "pipeline"
