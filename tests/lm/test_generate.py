"""``ringattn generate`` and ``ringattn chat``: models over several ranks, from the command line."""

from __future__ import annotations

import codecs
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import families
import mlx.nn as nn
import pytest
from click.testing import CliRunner

from ringattn.cli import main
from ringattn.cli.commands.generate import _text
from ringattn.cli.progress_bar import line

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

SMOLLM2 = ["--model", "smollm2", "--dtype", "float32"]
NO_MODEL = ["--model", "none.gguf"]
QUESTION = "w1 w2 w3"


class Done(NamedTuple):
    """The end of a command."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str, command: str = "generate", stdin: str | bytes = "") -> Done:
    """Run a command in a process of its own, which can start ranks."""
    line = [sys.executable, "-m", "ringattn.cli", command, *arguments]
    text = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run(line, input=text, capture_output=True, timeout=300)
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def run_here(*arguments: str, command: str = "generate", stdin: str | bytes = b"") -> Done:
    """Run a command on one rank in this process."""
    done = CliRunner().invoke(main, [command, *arguments], input=stdin)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception  # a user would see its traceback
    return Done(done.exit_code, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny random model."""
    return str(families.save(tmp_path_factory.mktemp("model")))


@pytest.mark.model
def test_ask_and_ask_again(tmp_path):
    """Two ranks answer as one does, and one continues their saved cache. The answers make sense."""
    text = tmp_path / "text.txt"
    text.write_text("The lighthouse keeper's name was Amparo Quiroga. She kept bees. " * 2)
    cache = str(tmp_path / "cache.json")
    question = "What was the lighthouse keeper's name? Answer with the name only."
    one = run_here(*SMOLLM2, "--prompt-file", str(text), "-p", question, "-m", "20")
    two = run("-n", "2", *SMOLLM2, "--prompt-file", str(text), "-p", question, "-m", "20", "--save-prompt-cache", cache)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert "Amparo Quiroga" in one.stdout and two.stdout == one.stdout
    assert "Ranks: 2, keys and values on this one" in two.stderr
    again = ["-p", "Say the lighthouse keeper's name again.", "-m", "20", "--prompt-cache-file", cache]
    three = run_here(*SMOLLM2, *again)
    assert three.returncode == 0 and "Amparo" in three.stdout, three.stdout + three.stderr


@pytest.mark.ranks
@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1"])
def test_a_hybrid(tmp_path, family):
    """Two ranks answer as one, and one or three continue their saved cache; a chat goes on as one rank's does."""
    model = ["--model", str(families.save(tmp_path, family)), "-m", "8"]
    cache = tmp_path / "cache.json"
    prompt = ["-p", "w1 w2 w3 " * 40]
    one = run_here(*model, *prompt)
    two = run("-n", "2", *model, *prompt, "--save-prompt-cache", str(cache))
    assert two.returncode == 0 and two.stdout == one.stdout != "", one.stderr + two.stderr
    assert re.search(r"Ranks: 2, keys, values and states on this one: \d+\.\d MB\.$", two.stderr), two.stderr
    again = ["-p", "w4 w5", "--prompt-cache-file", str(cache)]
    three, four = run_here(*model, *again), run("--ranks=3", *model, *again)
    assert three.returncode == 0 and three.stdout == four.stdout != "", three.stderr + four.stderr
    assert re.search(r"Prompt: \d\d? tokens", four.stderr), four.stderr  # only what is new
    lines = "w1 w2\nw3 w4\nr\nw3 w4\nq\n"
    chats = [
        run_here(*model, command="chat", stdin=lines),
        run("-n", "2", *model, command="chat", stdin=lines),
    ]
    assert chats[0].returncode == 0 and chats[0].stdout == chats[1].stdout, chats
    assert chats[1].stdout.splitlines()[-1] != chats[1].stdout.splitlines()[1], chats[1]


@pytest.mark.ranks
def test_chat(tiny):
    """The second turn knows the first; after 'r' it does not. What follows 'q' is not read."""
    model = ["--model", tiny, "-m", "8"]
    found = run("-n", "2", *model, command="chat", stdin="w1 w2\nw3 w4\nr\nw3 w4\nq\nnot read\n")
    known, forgotten = (
        run_here(*model, command="chat", stdin=lines).stdout.splitlines()
        for lines in ("w1 w2\nw3 w4\nq\n", "w3 w4\nq\n")
    )
    assert found.returncode == 0 and known[-1] != forgotten[-1], found
    assert found.stdout.splitlines() == [*known, *forgotten], found


@pytest.mark.ranks
def test_the_prompt_from_standard_input(tiny):
    expected, other = (run_here("--model", tiny, "-m", "8", "-p", text) for text in (QUESTION, "w4 w5 w6"))
    found = run("-n", "2", "--model", tiny, "-m", "8", "-p", "-", stdin=QUESTION)
    assert found.returncode == 0 and found.stdout == expected.stdout != other.stdout, found


@pytest.mark.ranks
def test_a_bar_on_a_terminal(tiny):
    """Rate and time left, and then the answer, also where ranks write into a pipe that the launcher passes on."""
    ours, theirs = pty.openpty()
    program = [sys.executable, "-m", "ringattn.cli", "generate", "-n", "2", "--model", tiny]
    options = ["-p", "w1 " * 300, "-m", "1", "--prefill-step-size", "64"]
    done = subprocess.run([*program, *options], stdout=subprocess.PIPE, stderr=theirs, stdin=theirs, timeout=300)
    os.close(theirs)
    shown = b""
    while part := _read(ours):
        shown += part
    assert shown.startswith(f"Loading {tiny} ...\r\n".encode()), shown
    bars = [bar for bar in shown.decode().split("\r") if "Reading [" in bar]
    assert done.returncode == 0 and len(bars) >= 3, shown
    assert re.fullmatch(r"Reading \[#+-+\] 128/\d+ tokens  [\d,]+ tokens/s  \d+:\d\d left *", bars[1]), bars
    assert re.match(r"Reading \[#+\] (\d+)/\1 tokens  [\d,]+ tokens/s *$", bars[-1]), bars


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # how a terminal ends
        return b""


def test_a_bar_with_hours_left():
    assert line(1000, 1_000_000, 10.0).endswith("1,000/1,000,000 tokens  100 tokens/s  2:46:30 left")


SAVE = ["--save-prompt-cache", "none/x.json"]
WRONG: list[tuple[list[str], str]] = [  # "TINY" stands for the folder of the tiny model
    (["--model", "none.gguf", "-p", "x"], "Error: --model: none.gguf, expected a GGUF file that exists"),
    (["--model", "/no/such/dir", "-p", "x"], "Error: --model: /no/such/dir: no such folder\n"),
    (["--model", "./none", "-p", "x"], "Error: --model: ./none: no such folder\n"),
    (["--model", "a/b/c", "-p", "x"], "Error: --model: a/b/c: no such folder\n"),
    (["--model", __file__, "-p", "x"], f"Error: --model: {__file__}, expected a model's folder or a file that"),
    (["--model", os.path.dirname(__file__), "-p", "x"], ", expected a folder with a model's config.json"),
    (["--model", "smollm2"], "Error: --prompt or --prompt-file is missing"),
    ([*NO_MODEL, "-p", "x", "--weights", "a,b"], "'--weights': 'a,b', expected numbers with commas"),
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
    # These are checked before the model is loaded.
    ([*NO_MODEL, "-p", "x", *SAVE], "--save-prompt-cache: none/x.json: there is no folder none"),
    ([*NO_MODEL, "-p", "x", "--prompt-cache-file", "none.json"], "--prompt-cache-file: none.json: No such file"),
    ([*NO_MODEL, "-p", "x", "--save-prompt-cache", "/"], "'--save-prompt-cache': File '/' is a directory"),
    ([*NO_MODEL, "--prompt-file", sys.executable], ", expected UTF-8"),
    ([*NO_MODEL, "--prompt-file", "none.txt"], "--prompt-file: none.txt: No such file or directory"),
    ([*NO_MODEL, "--prompt-file", os.devnull, "-p", "x"], f"--prompt-file: {os.devnull}: empty, expected a text"),
    ([*NO_MODEL, "-p", "a\udcff"], "--prompt: invalid start byte at byte 1, expected UTF-8"),
    (["--model", "TINY", "-p", "x", "--top-k", "61"], "--top-k: 61, expected less than 61"),
    (["--model", "TINY", "-p", "x", "--extra-eos-token", "xyzzzy"], "--extra-eos-token: 'xyzzzy', expected a"),
    (
        ["--model", "TINY", "-p", "x", "--system-prompt", "y", "--ignore-chat-template"],
        "--system-prompt: 'y', expected none: no chat template is used",
    ),
]
WRONG_ON_TWO_RANKS: list[tuple[list[str], str]] = [
    (["--model", "/no/such/dir", "-p", "x"], "Error: --model: /no/such/dir: no such folder\n"),
    ([*NO_MODEL, "-p", "x", "--prompt-cache-file", "none.json"], "--prompt-cache-file: none.json: No such file"),
    (["--model", "TINY", "-p", "x", "--weights", "1"], "Error: --weights: (1.0,), expected 2 finite numbers"),
    ([*NO_MODEL, "-p", "x", *SAVE], "none/x.json: there is no folder none"),
    ([*NO_MODEL, "-p", "-"], "--prompt: standard input: invalid start byte at byte 1, expected UTF-8"),
]


@pytest.mark.parametrize("command, options", [("generate", ["-p", "-"]), ("chat", [])])
def test_standard_input_that_was_closed(tiny, command, options):
    """For chat this is the end of the conversation."""
    line = [sys.executable, "-m", "ringattn.cli", command, "--model", tiny, *options]
    done = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *line], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    expected = (0, ">> ") if command == "chat" else (1, "Error: --prompt: standard input: empty, expected a text\n")
    assert (done.returncode, done.stderr.splitlines(keepends=True)[-1]) == expected


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    file = tmp_path / "notepad.txt"
    file.write_bytes(codecs.BOM_UTF8 + b"A text")
    assert _text({"prompt_file": file, "prompt": "Why?"}) == "A text\n\nWhy?"


def test_a_configuration_that_is_not_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    found = run_here("--model", str(tmp_path), "-p", "x")
    check_one_line(found, f"Error: --model: {tmp_path}: config.json is not JSON (Expecting property name enclosed")


def check_one_line(found: Done, message: str) -> None:
    assert found.returncode in (1, 2) and message in found.stderr and "Traceback" not in found.stderr, found.stderr
    lines = [line for line in found.stderr.splitlines() if not line.startswith("Warning: ")]
    assert len(lines) == 1 and lines[0].startswith("Error: "), found.stderr


@pytest.mark.parametrize("arguments, message", WRONG)
def test_wrong_input_is_one_line(tiny, arguments, message):
    found = run_here(*(tiny if one == "TINY" else one for one in arguments), stdin=b"a\xff")
    check_one_line(found, message)


@pytest.mark.ranks
@pytest.mark.parametrize("arguments, message", WRONG_ON_TWO_RANKS)
def test_wrong_input_on_two_ranks_is_one_line(tiny, arguments, message):
    found = run("-n", "2", *(tiny if one == "TINY" else one for one in arguments), stdin=b"a\xff")
    check_one_line(found, message)


@pytest.mark.ranks
def test_a_warning_is_one_line(tmp_path):
    """One line for all ranks together."""
    quantised = {"group_size": 32, "bits": 4}
    folder = families.save(tmp_path, quantization=quantised)
    model = families.build("llama")
    nn.quantize(model, **quantised, class_predicate=lambda name, _: name.endswith("down_proj"))
    families.save_weights(model, folder)
    found = run("-n", "2", "--model", str(folder), "-p", "x", "-m", "1")
    assert found.returncode == 0 and found.stderr.count("Warning") == 1, found.stderr
    assert found.stderr.startswith("Warning: MLX multiplies quantised weights slowly on a CPU"), found.stderr


@pytest.mark.parametrize("kept", [4, 50, -100])
def test_a_torn_model_is_one_line(tmp_path, kept):
    """Part of the length, of the header, or of the data is missing."""
    weights = families.save(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    found = run_here("--model", str(tmp_path), "-p", "x")
    assert found.returncode == 1 and f"Error: --model: {tmp_path}: [" in found.stderr, found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.ranks
def test_a_file_that_is_no_gguf_is_one_line(tmp_path):
    (tmp_path / "x.gguf").write_text("no")
    found = run("-n", "2", "--model", str(tmp_path / "x.gguf"), "-p", "x")
    assert found.returncode == 1 and "x.gguf: [load_gguf]" in found.stderr and "Traceback" not in found.stderr, found


def test_a_save_that_fails_in_the_end_is_one_line(tiny, tmp_path):
    """The answer is printed first, and the command ends without MPI's abort."""
    model = ["--model", tiny, "-p", QUESTION, "-m", "8"]
    cache = tmp_path / "cache.json"
    line = [sys.executable, "-c", FULL, "generate", *model, "--save-prompt-cache", str(cache)]
    found = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1 and found.stdout == run_here(*model).stdout != "", found
    assert f"Error: --save-prompt-cache: {cache}" in found.stderr and "Traceback" not in found.stderr, found.stderr
    assert not list(tmp_path.iterdir())


FULL = """
import resource, signal
from ringattn.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # as on a full disk
main()
"""


@pytest.mark.ranks
def test_more_ways_to_sample_and_to_end(tiny):
    """Top-k 1 and min-p 1 leave only the likeliest token, at any temperature. An added token ends a text."""
    model = ["--model", tiny, "-p", QUESTION, "-m", "24"]
    greedy = run_here(*model)
    for options in (["--top-k", "1"], ["--min-p", "1"]):
        assert run_here(*model, "--temp", "3", "--seed", "1", *options).stdout == greedy.stdout
    instructed = [*model, "--system-prompt", "w9 w8"]
    whole = run_here(*instructed).stdout.split()
    token = whole[len(whole) // 2]
    ended = run(*instructed, "-n", "2", "--extra-eos-token", token)
    assert ended.returncode == 0 and token not in ended.stdout.split(), ended
    assert ended.stdout.split() == whole[: whole.index(token)]


class Chat:
    """A running ``ringattn chat``."""

    def __init__(self, *arguments: str):
        line = [sys.executable, "-m", "ringattn.cli", "chat", *arguments]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.shown = b""

    def until(self, text: bytes) -> bytes:
        """Read the output until `text` comes; return the part before it."""
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


def saved_messages(cache: Path) -> list[str]:
    """The texts of the conversation that a saved cache has."""
    found = json.loads(cache.read_text())
    return [message["content"] for message in json.loads(found["metadata"]["messages"])]


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_interrupts_of_a_chat(tiny, tmp_path, ranks):
    """The first interrupt ends the answer. The second, at the prompt, ends the conversation, which is saved.

    A byte that is not UTF-8 ends nothing.
    """
    cache = tmp_path / "cache.json"
    chat = Chat("-n", str(ranks), "--model", tiny, "-m", "1000000", "--save-prompt-cache", str(cache))
    chat.until(b">> ")
    chat.say(b"w1 w2 \xff w3")
    chat.until(b"w")
    chat.interrupt()
    chat.until(b">> ")
    time.sleep(1.2)  # two interrupts within a second would end all
    chat.interrupt()
    assert chat.process.wait(60) == 0
    assert len(list(tmp_path.iterdir())) == ranks + 1
    question, answer = saved_messages(cache)
    assert question == "w1 w2 \ufffd w3" and answer.startswith("w")
    files = ["--prompt-cache-file", str(cache), "--save-prompt-cache", str(cache)]
    two = Chat("-n", str(ranks), "--model", tiny, "-m", "8", *files)
    two.until(b">> ")
    two.say(b"w4")
    assert b"w" in two.until(b">> ")
    two.say(b"q")
    assert two.process.wait(60) == 0
    assert saved_messages(cache)[:3] == [question, answer, "w4"]


@pytest.mark.ranks
def test_an_interrupted_question_leaves_nothing(tiny, tmp_path):
    """Nothing is saved, and the next question would be the first, with the system prompt."""
    cache = tmp_path / "cache.json"
    options = ["--prefill-step-size", "16", "--system-prompt", "w9 w8", "--save-prompt-cache", str(cache)]
    chat = Chat("-n", "2", "--model", tiny, "-m", "1000000", *options)
    chat.until(b">> ")
    chat.say(b"w1 " * 20000)
    time.sleep(1.5)
    chat.interrupt()
    chat.until(b">> ")
    chat.say(b"q")
    assert chat.process.wait(20) == 0 and not list(tmp_path.iterdir())


@pytest.mark.ranks
def test_two_interrupts_at_once_end_all_ranks(tiny):
    """The ranks end even before they react to the first."""
    chat = Chat("-n", "2", "--model", tiny, "-m", "1000000", "--prefill-step-size", "16")
    chat.until(b">> ")
    chat.say(b"w1 " * 20000)
    time.sleep(1.5)
    chat.interrupt()
    time.sleep(0.1)
    chat.interrupt()
    assert chat.process.wait(20) == 130


@pytest.mark.model
def test_weights_shared_by_two_ranks(tiny: str, tmp_path: Path) -> None:
    """Two ranks with half of the weights each answer as one, and continue a saved cache."""
    cache = str(tmp_path / "cache.json")
    one = run_here("--model", tiny, "-p", QUESTION, "-m", "9")
    two = run("-n", "2", "--tensor", "2", "--model", tiny, "-p", QUESTION, "-m", "9", "--save-prompt-cache", cache)
    assert two.returncode == 0 and two.stdout == one.stdout, two
    again = run("-n", "2", "--tensor", "2", "--model", tiny, "-p", "w4", "-m", "3", "--prompt-cache-file", cache)
    assert again.returncode == 0 and again.stdout, again
    alone = run_here("--model", tiny, "-p", "w4", "-m", "3", "--prompt-cache-file", cache)
    assert alone.returncode == 1 and "another model's" in alone.stderr


@pytest.mark.model
@pytest.mark.parametrize(
    ("ranks", "tensor", "told"),
    [
        ("2", "3", "Error: --tensor: 3, expected a divisor of 2, the number of ranks"),
        ("3", "3", "Error: --tensor: 3, expected a divisor of 4, the attention heads of llama"),
    ],
)
def test_wrong_tensor(tiny: str, ranks: str, tensor: str, told: str) -> None:
    found = run("-n", ranks, "--tensor", tensor, "--model", tiny, "-p", QUESTION)
    assert found.returncode == 1 and told in found.stderr and "Traceback" not in found.stderr, found


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["3", "6"])
def test_smollm2_with_shared_weights(ranks: str) -> None:
    """SmolLM2 has 9 heads and 3 of keys: three ranks share them, also twice, and give the tokens of one process."""
    prompt = ["-p", "Tell me about the sea in a long sentence, please.", "-m", "12"]
    one = run_here(*SMOLLM2, *prompt)
    many = run("-n", ranks, "--tensor", "3", *SMOLLM2, *prompt)
    assert (one.returncode, many.returncode) == (0, 0), one.stderr + many.stderr
    assert many.stdout == one.stdout != ""
