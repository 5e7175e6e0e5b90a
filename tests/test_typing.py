"""What a type checker makes of a program that uses ringattn: mypy runs on small ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

PROGRAM = """
import mlx.core as mx
import ringattn as ra

def run(x: mx.array, ring: ra.Ring, layout: ra.Layout, with_lse: bool) -> None:
    for one in (
        ra.attention(x, x, x, mask="causal", scale=0.5),
        ra.attention(x, x, x, return_lse=False, positions=([0, 1], [0, 1])),
        ra.ring_attention(x, x, x, ring=ring, layout=layout, strategy="pass_q"),
        ra.decode_attention(x, x, x, ring=ring, kv_layout=layout, start=3),
        ra.linear_attention(x, x, x, log_decay=x, beta=x),
        ra.ring_linear_attention(x, x, x, ring=ring, layout=layout, beta=x),
        ra.ring_short_conv(x, x, ring=ring, layout=layout),
    ):
        print(one.shape)
    for out, lse in (
        ra.attention(x, x, x, return_lse=True, segments=(x, x)),
        ra.ring_attention(x, x, x, ring=ring, layout=layout, segments=x, return_lse=True),
        ra.decode_attention(x, x, x, ring=ring, kv_layout=layout, return_lse=True),
        ra.linear_attention(x, x, x, state=x, return_state=True),
        ra.ring_linear_attention(x, x, x, ring=ring, layout=layout, return_state=True),
        ra.ring_short_conv(x, x, ring=ring, layout=layout, return_state=True),
    ):
        print(out.shape, lse.shape)
    either = ra.attention(x, x, x, return_lse=with_lse)
    print(either[0] if isinstance(either, tuple) else either)
    {more}
"""


def check(tmp_path: Path, more: str) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(more=more))
    line = [sys.executable, "-m", "mypy", "--config-file", "", "--ignore-missing-imports", "--follow-imports", "silent"]
    return subprocess.run([*line, str(program)], capture_output=True, text=True, cwd=Path(__file__).parents[1])


def test_the_result_depends_on_return_lse(tmp_path):
    done = check(tmp_path, "")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("print(ra.attention(x, x, x, return_lse=True).shape)", 'has no attribute "shape"'),
        ("ra.attention(x, x, x, casual=True)", "casual"),
        ("ra.ring_attention(x, x, x, ring=ring)", "ring_attention"),
    ],
)
def test_mistakes_are_found(tmp_path, wrong, message):
    done = check(tmp_path, wrong)
    assert done.returncode == 1 and message in done.stdout, done.stdout
