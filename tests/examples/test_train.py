"""``examples/train.py``: four ranks train what one process trains, and a run that was killed goes on."""

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

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
SMALL = ["--tokens", "192", "--dims", "16", "--layers", "2", "--heads", "2", "--rate", "0.01"]


def start(ranks: int, folder: Path, *options: str) -> subprocess.Popen:
    script = [str(ROOT / "examples" / "train.py"), "--out", str(folder), *SMALL, *options]
    line = [sys.executable, *script]
    if ranks > 1:
        line = [sys.executable, "-m", "ringattn.cli", "launch", "-n", str(ranks), "--", *line]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    pipe = subprocess.PIPE
    return subprocess.Popen(line, env={**os.environ, "PYTHONPATH": path}, stdout=pipe, stderr=pipe, text=True)


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
    """The losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(1, folder, "--steps", "10", "--batch", "2")
    return losses(folder)


def test_four_ranks_train_as_one_process(tmp_path, alone):
    out = train(4, tmp_path, "--steps", "10", "--batch", "2", "--recompute")
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-5)
    assert alone[-1] < 0.9 * alone[0] and "step 10 of 10" in out
    assert (tmp_path / "losses.png").stat().st_size > 5000


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


def test_wrong_input_is_one_line(tmp_path):
    process = start(1, tmp_path, "--dims", "30")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "--dims: 30, expected a multiple of twice --heads 2" in err
