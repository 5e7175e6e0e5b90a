"""Start of the commands that run a language model."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import pytest

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from tiny_model import make_folder

from ringattn import ArgumentError
from ringattn.cli.lm_command import LONGEST_ERROR, load_model


def test_a_model_that_does_not_load_tells_why_in_one_line(tmp_path: Path) -> None:
    """The line has the names of missing weights, which mlx-lm writes on lines of their own."""
    weights = dict(mx.load(str(make_folder(tmp_path) / "model.safetensors")))
    gone = ["model.layers.0.input_layernorm.weight", "model.norm.weight"]
    kept = {name: weight for name, weight in weights.items() if name not in gone}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), kept, {"format": "mlx"})
    with pytest.raises(ArgumentError) as found:
        load_model({"model": str(tmp_path), "dtype": None, "top_k": 0})
    message = str(found.value)
    assert message.startswith(f"--model: {tmp_path}: Missing") and all(name in message for name in gone)
    assert "\n" not in message and len(message) < LONGEST_ERROR + 100 + len(str(tmp_path))
