"""``examples/train.py``: four ranks train like one process, and a run that was killed can continue."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--tokens", "192", "--dims", "16", "--layers", "2", "--heads", "2", "--rate", "0.01"]


def start(ranks: int, folder: Path, *options: str, path: Path = ROOT) -> subprocess.Popen:
    script = [str(ROOT / "examples" / "train.py"), "--out", str(folder), *SMALL, *options]
    line = [sys.executable, *script]
    if ranks > 1:
        line = [sys.executable, "-m", "ringattn.cli", "launch", "-n", str(ranks), "--", *line]
    paths = os.pathsep.join(filter(None, [str(path), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    pipe = subprocess.PIPE
    return subprocess.Popen(line, env={**os.environ, "PYTHONPATH": paths}, stdout=pipe, stderr=pipe, text=True)


def train(ranks: int, folder: Path, *options: str) -> str:
    process = start(ranks, folder, *options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def losses(folder: Path) -> np.ndarray:
    with (folder / "losses.csv").open() as file:
        rows = [(int(step), float(loss)) for step, loss in csv.reader(file)]
    assert [step for step, _ in rows] == list(range(1, len(rows) + 1))
    return np.array([loss for _, loss in rows])


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> np.ndarray:
    """Losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(1, folder, "--steps", "10", "--batch", "2")
    return losses(folder)


@pytest.mark.ranks
def test_four_ranks_train_as_one_process(tmp_path, alone):
    out = train(4, tmp_path, "--steps", "10", "--batch", "2", "--recompute", "--plot")
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-5)
    assert alone[-1] < 0.9 * alone[0] and "step 10 of 10" in out
    assert (tmp_path / "losses.png").stat().st_size > 5000


@pytest.mark.ranks
def test_a_killed_run_goes_on(tmp_path, alone):
    process = start(2, tmp_path, "--steps", "100000", "--batch", "2", "--save-every", "4")
    end = time.monotonic() + 60
    while time.monotonic() < end and not (tmp_path / "checkpoint.safetensors").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    before = losses(tmp_path)
    steps = str(len(before) // 4 * 4 + 6)
    out = train(2, tmp_path, "--steps", steps, "--batch", "2", "--save-every", "4")
    after = losses(tmp_path)
    assert "going on after step" in out and len(after) == int(steps)
    shared = min(len(after), len(alone))
    np.testing.assert_allclose(after[:shared], alone[:shared], rtol=1e-5)


@pytest.fixture
def without_matplotlib(tmp_path) -> Path:
    """Folder that hides matplotlib from programs with the folder on their path."""
    folder = tmp_path / "hidden"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    return folder


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.ranks)])
def test_a_plot_is_asked_for_by_name(tmp_path, without_matplotlib, ranks):
    """Without matplotlib, training finishes, and training with --plot does not begin."""
    out = tmp_path / "run"
    process = start(ranks, out, "--steps", "2", "--save-every", "1", path=without_matplotlib)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == ""
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.safetensors", "losses.csv"]
    process = start(ranks, tmp_path / "other", "--steps", "2", "--plot", path=without_matplotlib)
    _, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if not line.startswith("ringattn: rank")]
    assert lines == ["Error: --plot: matplotlib is not installed: pip install 'ringattn[plot]'"]
    assert process.returncode == 1 and not (tmp_path / "other").exists()


@pytest.mark.ranks
def test_another_model_in_the_folder_is_one_line(tmp_path):
    """Two ranks fail, although only one reads the folder."""
    train(1, tmp_path, "--steps", "1")
    process = start(2, tmp_path, "--steps", "2", "--layers", "1")
    _, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if not line.startswith("ringattn: rank")]
    assert process.returncode == 1
    assert lines == [
        f"Error: {tmp_path / 'checkpoint.safetensors'}: holds another model; give another --out, or remove it"
    ]


def test_wrong_input_is_one_line(tmp_path):
    process = start(1, tmp_path, "--dims", "30")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "--dims: 30, expected a multiple of twice --heads 2" in err
