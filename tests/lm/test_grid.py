"""Runs of ``tests/spmd_grid``, whose tests all ranks of a grid execute together, on grids of several shapes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest
from families import build, save, save_weights
from mlx.utils import tree_flatten
from spawn import spawn

pytestmark = pytest.mark.ranks


ALL_SHAPES = [(1, 1), (3, 3), (4, 2), (4, 4), (6, 3)]
KINDS = "not (test_logits or part_of_the_weights) or llama or gemma3 or deepseek_v3 or qwen3_5 or qwen3_moe"


@pytest.mark.parametrize(
    ("ranks", "tensor", "only"),
    [(2, 2, ""), (4, 2, KINDS), *(pytest.param(*shape, "", marks=pytest.mark.slow) for shape in ALL_SHAPES)],
)
def test_grid(ranks: int, tensor: int, only: str) -> None:
    """All families on one row; families that differ in kind on two rows. Other shapes are for the night."""
    arguments = ["-m", "pytest", "tests/spmd_grid", "-k", only, "-x", "-p", "no:cacheprovider"]
    result = spawn(ranks, arguments, timeout=600, env={"RINGATTN_TEST_TENSOR": str(tensor)})
    assert result.code == 0, str(result)


LOAD = """
import json, sys
import mlx.core as mx
from mlx.utils import tree_flatten
import mlx_lm
import ringattn as ra
from ringattn import lm

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

folder = sys.argv[1]
with ra.init() as ring, ra.grid(ring, 2) as grid:
    mlx_lm.utils.load_tokenizer(folder)  # imports
    before = memory("VmRSS")
    model, _ = lm.load(folder, grid=grid)
    peak = memory("VmHWM") - before
    arrays = mx.get_peak_memory()
    lm.shard(model, grid)
    held = sum(x.nbytes for _, x in tree_flatten(model.parameters()))
    print("found: " + json.dumps([peak, arrays, held]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("bits", [None, 8])
def test_loading_holds_a_part_of_the_weights(tmp_path: Path, bits: int | None) -> None:
    """In its peak, a rank holds its part of the weights and less than one whole tensor more."""
    sizes = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    folder = save(tmp_path, **sizes, head_dim=192)
    model = build("llama", **sizes, head_dim=192)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization": {"group_size": 32, "bits": bits}}))
    save_weights(model, folder)
    leaves: Any = tree_flatten(model.parameters())
    whole = sum(x.nbytes for _, x in leaves)
    largest = max(x.nbytes for _, x in leaves)
    del model, leaves
    # glibc keeps freed blocks of up to 32 MB for later ones, unless its threshold is given.
    env = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    result = spawn(2, ["-c", LOAD, str(folder)], timeout=300, env=env)
    assert result.code == 0, str(result)
    found = [json.loads(line) for line in re.findall("found: (.*)", result.output)]
    assert whole > (100 if bits else 400) * 1e6 and len(found) == 2
    for peak, arrays, held in found:
        assert held < 0.51 * whole
        assert arrays < held + largest + 1e6, (found, largest, whole)
        assert peak < held + largest + 8e6, (found, largest, whole)
