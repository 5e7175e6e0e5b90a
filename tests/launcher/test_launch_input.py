"""Standard input under `ringattn launch`, which rank 0 gets whole, and what ranks print, with the rank before it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spawn import ROOT

from ringattn.launcher import program_streams
from ringattn.launcher.program_streams import Prefixer

READ_ALL = (
    "import sys, time; time.sleep({seconds}); read = sys.stdin.buffer.read(); print(len(read), sum(read), flush=True)"
)
LAUNCH = [sys.executable, "-m", "ringattn.cli", "launch"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


# Prefixes


def prefixed(prefix: bytes, text: bytes) -> bytes:
    return b"".join(prefix + line for line in text.splitlines(keepends=True))


@given(st.lists(st.text(alphabet="a\n", max_size=9).map(str.encode)))
def test_each_line_has_its_prefix_however_the_stream_is_cut(parts):
    lines = Prefixer(b"[0] ")
    returned = [lines.feed(part) for part in parts]
    assert all(text.endswith(b"\n") for text in returned if text)
    assert b"".join([*returned, lines.flush()]) == prefixed(b"[0] ", b"".join(parts))


def test_a_line_goes_on_after_a_part_of_it_was_flushed():
    lines = Prefixer(b"[0] ")
    assert (lines.feed(b"name? "), lines.holds, lines.flush(), lines.holds) == (b"", True, b"[0] name? ", False)
    assert lines.feed(b"Ada\nx") + lines.flush() == b"Ada\n[0] x"


@pytest.mark.parametrize("part", [1, 100, 5000])
def test_a_line_without_an_end_is_not_kept(monkeypatch, part):
    """At most one piece is held: so time is linear in the line's length, and memory does not depend on it."""
    monkeypatch.setattr(program_streams, "_LONGEST_LINE", 1000)
    lines = Prefixer(b"[0] ")
    fed = returned = 0
    for _ in range(20_000 // part):
        fed += part
        returned += len(lines.feed(b"x" * part).removeprefix(b"[0] "))
        assert 0 <= fed - returned < 1000
    assert returned + len(lines.flush()) == fed


def test_a_long_line_among_others_is_passed_on_in_order(monkeypatch):
    monkeypatch.setattr(program_streams, "_LONGEST_LINE", 10)
    lines = Prefixer(b"> ")
    assert lines.feed(b"a\nbb") == b"> a\n"
    assert lines.feed(b"c" * 10) == b"> bbcccccccccc"
    assert lines.feed(b"d\ne\n") == b"d\n> e\n"


# Runs


def launch(*arguments: str, stdin: object, timeout: float = 60, **changed: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCH, *arguments],
        stdin=stdin,  # type: ignore[call-overload]
        env={**ENVIRONMENT, **changed},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A file of more than all buffers on the way hold together, no two parts of which are the same."""
    path = tmp_path / "book.txt"
    path.write_bytes(b"".join(b"%d\n" % number for number in range(1_500_000)))
    return path


@pytest.mark.ranks
def test_output_without_line_ends(tmp_path: Path):
    code = "import sys\nfor i in range(40): sys.stdout.write(str(i % 10) * 100_000)"
    result = launch("-n", "1", "--prefix", "--", sys.executable, "-c", code, stdin=subprocess.DEVNULL)
    expected = "[0] " + "".join(str(i % 10) * 100_000 for i in range(40))
    assert (result.returncode, result.stdout == expected) == (0, True), result.stderr


@pytest.mark.ranks
def test_a_long_input_reaches_a_rank_that_reads_late(book: Path):
    """Later than the timeout after which a silent host counts as gone, and long after all buffers are full."""
    code = READ_ALL.format(seconds=6)
    with book.open("rb") as file:
        result = launch("-n", "2", "--timeout", "2", "--", sys.executable, "-c", code, stdin=file)
    data = book.read_bytes()
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(result.stdout.splitlines()) == ["0 0", f"{len(data)} {sum(data)}"]  # the other rank's is empty


@pytest.mark.ranks
@pytest.mark.parametrize("program", ["exit 0", "read line; echo $line", "exec <&-; sleep 0.5", "sleep 0.5"])
def test_a_rank_that_does_not_read_to_the_end(program: str):
    """Of an input without one."""
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as endless:
        begin = time.monotonic()
        result = launch("-n", "2", "--", "sh", "-c", program, stdin=endless.stdout)
        endless.kill()
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == (["y"] if "echo" in program else [])
    assert time.monotonic() - begin < 20


@pytest.mark.ranks
@pytest.mark.parametrize("redirection", ["<&-", "</dev/null", "0>/dev/null", ""])
def test_an_input_that_is_closed_or_empty_ends_at_once(redirection: str):
    line = ["sh", "-c", f'exec "$@" {redirection}', "sh", *LAUNCH, "-n", "2", "--", "cat"]
    result = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=30, input="")
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


@pytest.mark.ranks
def test_a_failing_rank_ends_all_while_input_waits(book: Path):
    code = "import os, sys, time; time.sleep(0.5); sys.exit(7 * (os.environ.get('{}') == '1'))"
    code = code.format("PMI_RANK' if 'PMI_RANK' in os.environ else 'OMPI_COMM_WORLD_RANK")
    with book.open("rb") as file:
        result = launch("-n", "2", "--", sys.executable, "-c", code, stdin=file)
    assert result.returncode == 7, result.stderr


class Terminal:
    """A terminal whose foreground job is a command."""

    def __init__(self, line: list[str]) -> None:
        self.shown = ""
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            line, stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT, preexec_fn=self._settle
        )
        os.close(theirs)

    @staticmethod
    def _settle() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def enter(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def await_text(self, text: str) -> None:
        self._read(lambda: text in self.shown)

    def end(self) -> int:
        self._read(lambda: False)
        os.close(self._ours)
        return self.process.wait(30)

    def _read(self, enough: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not enough():
            if not select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.process.kill()
                raise AssertionError(f"nothing more on the terminal after {self.shown!r}")
            try:
                part = os.read(self._ours, 4096)
            except OSError:  # nobody has it open any more
                return
            self.shown += part.decode()


@pytest.mark.ranks
def test_a_conversation_on_a_terminal():
    talk = "import sys\nfor line in sys.stdin: print('hello ' + line.strip(), flush=True)\nprint('bye', flush=True)"
    terminal = Terminal([*LAUNCH, "-n", "1", "--", sys.executable, "-uc", f"print('name?')\n{talk}"])
    for name in ("Ada", "Grace"):
        terminal.await_text("name?")
        terminal.enter(f"{name}\n")
        terminal.await_text(f"hello {name}")
    terminal.enter("\x04")  # Ctrl-D
    assert terminal.end() == 0 and "bye" in terminal.shown


@pytest.mark.ranks
def test_ctrl_c_on_a_terminal_while_rank_0_reads():
    terminal = Terminal([*LAUNCH, "-n", "2", "--", "sh", "-c", "echo ready; cat"])
    terminal.await_text("ready")
    terminal.enter("\x03")
    assert terminal.end() == 130


@pytest.mark.ranks
def test_in_the_background_the_terminal_is_left_to_the_shell():
    job = " ".join(f"'{word}'" for word in [*LAUNCH, "-n", "1", "--", "sh", "-c", "echo ready; sleep 1; echo done"])
    terminal = Terminal(["sh", "-c", f"set -m; {job} & wait; read line; echo shell: $line"])
    terminal.await_text("ready")
    terminal.enter("typed\n")
    assert terminal.end() == 0 and "done" in terminal.shown and "shell: typed" in terminal.shown
