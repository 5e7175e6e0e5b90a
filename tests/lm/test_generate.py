"""``ringattn generate``: a real model over several ranks, from the command line."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import families
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from ringattn.cli.progress_bar import line

pytestmark = pytest.mark.model


NO_MODEL = ["--model", "none.gguf"]


def run(*arguments: str, command: str = "generate", stdin: str | bytes = "") -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "ringattn.cli", command, *arguments]
    text = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run(line, input=text, capture_output=True, timeout=300)
    return subprocess.CompletedProcess(line, done.returncode, done.stdout.decode(), done.stderr.decode())


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
    model = ["--model", "smollm2", "--dtype", "float32"]
    found = run("-n", "2", *model, "-m", "8", "-p", "-", stdin="What is the capital of France?")
    assert found.returncode == 0 and "Paris" in found.stdout, found


def test_a_bar_on_a_terminal():
    """Also where ranks write into a pipe that the launcher passes on: rate and time left, and then the answer."""
    ours, theirs = pty.openpty()
    program = [sys.executable, "-m", "ringattn.cli", "generate", "-n", "2", "--model", "smollm2", "--dtype", "float32"]
    options = ["-p", "word " * 200, "-m", "1", "--prefill-step-size", "64"]
    done = subprocess.run([*program, *options], stdout=subprocess.PIPE, stderr=theirs, stdin=theirs, timeout=300)
    os.close(theirs)
    shown = b""
    while part := _read(ours):
        shown += part
    assert shown.startswith(b"Loading smollm2 ...\r\n"), shown
    bars = [bar for bar in shown.decode().split("\r") if "Reading [" in bar]
    assert done.returncode == 0 and len(bars) >= 3, shown
    assert re.fullmatch(r"Reading \[#+-+\] 128/\d+ tokens  \d+ tokens/s  \d+:\d\d left *", bars[1]), bars
    assert re.match(r"Reading \[#+\] (\d+)/\1 tokens  \d+ tokens/s *$", bars[-1]), bars


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # how a terminal ends
        return b""


def test_the_bar_tells_long_times():
    assert line(1000, 1_000_000, 10.0).endswith("1,000/1,000,000 tokens  100 tokens/s  2:46:30 left")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--model", "none.gguf", "-p", "x"], "Error: --model: none.gguf, expected a GGUF file that exists"),
        (["--model", "/no/such/dir", "-p", "x"], "Error: --model: /no/such/dir: no such folder\n"),
        (["--model", "/no/such/dir", "-p", "x", "-n", "2"], "Error: --model: /no/such/dir: no such folder\n"),
        (["--model", "./none", "-p", "x"], "Error: --model: ./none: no such folder\n"),
        (["--model", "a/b/c", "-p", "x"], "Error: --model: a/b/c: no such folder\n"),
        (["--model", __file__, "-p", "x"], f"Error: --model: {__file__}, expected a model's folder or a file that"),
        (["--model", os.path.dirname(__file__), "-p", "x"], ", expected a folder with a model's config.json"),
        (["--model", "smollm2"], "Error: --prompt or --prompt-file is missing"),
        (["--model", "smollm2", "-p", "x", "-n", "2", "--prompt-cache-file", "none.json"], "none.json: No such file"),
        (["--model", "smollm2", "-p", "x", "-n", "2", "--weights", "1"], "weights: (1.0,), expected 2 finite numbers"),
        (["--model", "smollm2", "-p", "x", "--weights", "a,b"], "--weights: 'a,b', expected numbers with commas"),
        ([*NO_MODEL, "-p", "x", "--seed", "-1"], "'--seed': -1 is not in the range"),
        ([*NO_MODEL, "-p", "x", "--seed", "9" * 30], "is not in the range 0<=x<=18446744073709551615"),
        ([*NO_MODEL, "-p", "x", "--temp", "nan"], "'--temp': nan, expected a finite number"),
        ([*NO_MODEL, "-p", "x", "--temp", "inf"], "'--temp': inf, expected a finite number"),
        ([*NO_MODEL, "-p", "x", "--top-p", "nan"], "'--top-p': nan, expected a finite number"),
        ([*NO_MODEL, "-p", "x", "--min-p", "nan"], "'--min-p': nan, expected a finite number"),
        ([*NO_MODEL, "-p", "x", "--chat-template-config", "[1]"], "'[1]', expected a JSON object such as"),
        (
            [*NO_MODEL, "-p", "x", "--system-prompt", "y", "--prompt-cache-file", "z"],
            "--system-prompt: given with --prompt-cache-file",
        ),
        # These are found out before the model is looked at.
        ([*NO_MODEL, "-p", "x", "--save-prompt-cache", "none/x.json"], "--save-prompt-cache: none/x.json, expected"),
        ([*NO_MODEL, "-p", "x", "-n", "2", "--save-prompt-cache", "none/x.json"], "none/x.json, expected a file in a"),
        ([*NO_MODEL, "-p", "x", "--save-prompt-cache", "/"], "'--save-prompt-cache': File '/' is a directory"),
        ([*NO_MODEL, "--prompt-file", sys.executable], ", expected UTF-8"),
        ([*NO_MODEL, "--prompt-file", "none.txt"], "--prompt-file: none.txt: No such file or directory"),
        ([*NO_MODEL, "-p", "a\udcff"], "--prompt: invalid start byte at byte 1, expected UTF-8"),
        ([*NO_MODEL, "-n", "2", "-p", "-"], "--prompt: standard input: invalid start byte at byte 1, expected UTF-8"),
        (["--model", "smollm2", "-p", "x", "--top-k", "49152"], "--top-k: 49152, expected less than 49152"),
        (["--model", "smollm2", "-p", "x", "--extra-eos-token", "xyzzzy"], "--extra-eos-token: 'xyzzzy', expected a"),
        (
            ["--model", "smollm2", "-p", "x", "--system-prompt", "y", "--ignore-chat-template"],
            "--system-prompt: 'y', expected none: no chat template is used",
        ),
    ],
)
def test_wrong_input_is_one_line(arguments, told):
    found = run(*arguments, stdin=b"a\xff")
    assert found.returncode in (1, 2) and told in found.stderr and "Traceback" not in found.stderr, found.stderr
    lines = [line for line in found.stderr.splitlines() if not line.startswith("Warning: ")]
    assert len(lines) == 1 and lines[0].startswith("Error: "), found.stderr


def test_a_warning_is_one_line():
    """For all ranks."""
    found = run("-n", "2", "--model", "smollm2", "-p", "x", "-m", "1")
    assert found.returncode == 0 and found.stderr.count("Warning") == 1, found.stderr
    assert found.stderr.startswith("Warning: MLX multiplies quantised weights slowly on a CPU"), found.stderr


@pytest.mark.parametrize("kept", [4, 50, -100])
def test_a_torn_model_is_one_line(tmp_path, kept):
    """Its length, its header, or its data are not all there."""
    whole = tmp_path / "model.safetensors"
    mx.save_safetensors(str(whole), dict(tree_flatten(families.build("llama").parameters())))
    whole.write_bytes(whole.read_bytes()[:kept])
    (tmp_path / "config.json").write_text(json.dumps({**families.BASE, "model_type": "llama"}))
    found = run("--model", str(tmp_path), "-p", "x")
    assert found.returncode == 1 and f"Error: --model: {tmp_path}: [" in found.stderr, found.stderr
    assert "Traceback" not in found.stderr


def test_a_file_that_is_no_gguf_is_one_line(tmp_path):
    (tmp_path / "x.gguf").write_text("no")
    found = run("-n", "2", "--model", str(tmp_path / "x.gguf"), "-p", "x")
    assert found.returncode == 1 and "x.gguf: [load_gguf]" in found.stderr and "Traceback" not in found.stderr, found


def test_a_save_that_fails_in_the_end_is_one_line(tmp_path):
    """On all ranks, without MPI's abort; the answer has been given."""
    model = ["--model", "smollm2", "--dtype", "float32", "-p", "What is the capital of France?", "-m", "8"]
    cache = tmp_path / "cache.json"
    line = [sys.executable, "-c", FULL, "generate", *model, "--save-prompt-cache", str(cache)]
    found = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1 and "Paris" in found.stdout, found
    assert f"Error: --save-prompt-cache: {cache}" in found.stderr and "Traceback" not in found.stderr, found.stderr
    assert not list(tmp_path.iterdir())


FULL = """
import resource, signal
from ringattn.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # as on a disk that is full
main()
"""


def test_more_ways_to_sample_and_to_end():
    """The likeliest token alone is what remains of top-k 1 and of min-p 1, at any temperature; a full stop ends."""
    model = ["--model", "smollm2", "--dtype", "float32", "-p", "Say: one, two. Three.", "-m", "24"]
    greedy = run(*model)
    for options in (["--top-k", "1"], ["--min-p", "1"]):
        assert run(*model, "--temp", "3", "--seed", "1", *options).stdout == greedy.stdout
    ended = run(*model, "-n", "2", "--extra-eos-token", ",", "--system-prompt", "Count: one, two, three.")
    assert ended.returncode == 0 and "," not in ended.stdout.rstrip("\n"), ended


class Chat:
    """A running ``ringattn chat``."""

    def __init__(self, *arguments: str):
        line = [sys.executable, "-m", "ringattn.cli", "chat", "--model", "smollm2", "--dtype", "float32", *arguments]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.shown = b""

    def until(self, text: bytes) -> bytes:
        """What is shown until `text` comes."""
        assert self.process.stdout is not None
        while text not in self.shown:
            part = os.read(self.process.stdout.fileno(), 4096)
            assert part, self.shown
            self.shown += part
        before, _, self.shown = self.shown.partition(text)
        return before

    def say(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


@pytest.mark.parametrize("ranks", [1, 2])
def test_interrupts_of_a_chat(tmp_path, ranks):
    """The first ends the answer, the second, at the prompt, the conversation, which is saved; no byte ends it."""
    cache = tmp_path / "cache.json"
    chat = Chat("-n", str(ranks), "-m", "2000", "--save-prompt-cache", str(cache))
    chat.until(b">> ")
    chat.say(b"Tell me a long story of a \xff king.")
    chat.until(b"king")
    chat.interrupt()
    chat.until(b">> ")
    time.sleep(1.2)  # twice at once would end all
    chat.interrupt()
    assert chat.process.wait(60) == 0
    assert len(list(tmp_path.iterdir())) == ranks + 1
    two = Chat("-n", str(ranks), "-m", "8", "--prompt-cache-file", str(cache))
    two.until(b">> ")
    two.say(b"Who is the story about?")
    assert b"king" in two.until(b">> ").lower()
    two.say(b"q")
    assert two.process.wait(60) == 0


def test_an_interrupted_question_leaves_nothing(tmp_path):
    """Nor is there anything to save; the next one is the first, with the system prompt."""
    cache = tmp_path / "cache.json"
    options = ["--prefill-step-size", "16", "--system-prompt", "You are a pirate.", "--save-prompt-cache", str(cache)]
    chat = Chat("-n", "2", "-m", "2000", *options)
    chat.until(b">> ")
    chat.say(b"word " * 4000)
    time.sleep(1.5)
    chat.interrupt()
    chat.until(b">> ")
    chat.say(b"q")
    assert chat.process.wait(20) == 0 and not list(tmp_path.iterdir())


def test_two_interrupts_at_once_end_all_ranks():
    """However far the ranks are from heeding the first."""
    chat = Chat("-n", "2", "-m", "2000", "--prefill-step-size", "16")
    chat.until(b">> ")
    chat.say(b"word " * 4000)
    time.sleep(1.5)
    chat.interrupt()
    time.sleep(0.1)
    chat.interrupt()
    assert chat.process.wait(20) == 130
