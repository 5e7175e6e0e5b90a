"""Comparison with rivals: choice of the fastest, reasons of failures, and the section of the page."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.rivals import computed, page, results, starting, tables
from benchmarks.rivals import job as job_module
from benchmarks.rivals.__main__ import main
from benchmarks.rivals.job import Job, pieces
from benchmarks.rivals.operator import FEW, Operator, Piece, problems
from benchmarks.rivals.problem import Problem, exact_rows, relative_error
from benchmarks.rivals.results import JobRow, OperatorRow
from benchmarks.rivals.roster import FIRST, OURS, ROSTER
from benchmarks.rivals.worker import compare, one_line

PROBLEM = Problem(4096, 8, 2, 64, causal=True, gradient=False)
TINY = Problem(24, 4, 2, 8, causal=True, gradient=False)


def row(rival: str, way: str, *seconds: float, failed: str = "", problem: Problem = PROBLEM) -> OperatorRow:
    return OperatorRow("loopback", problem, rival, way, list(seconds), 1e-7, {}, failed)


ROWS = [
    row("ringattn", "ring", 1.0, 1.2, 5.0),
    row("ringattn, one process", "alone", 0.1),
    row("torch", "grouped", 3.0, 2.4, 2.5),
    row("torch", "expanded", 1.5, 1.8, 2.0),
    row("other", "slow", 9.0),
    row("broken", "own", failed="ValueError: no | kernel"),
]


def test_lead_is_that_over_the_fastest_way_of_the_fastest_rival() -> None:
    name, ratio = tables.lead(tables.fastest(ROWS)) or ("", 0.0)
    assert name == "torch"
    assert ratio == pytest.approx(1.8 / 1.2)


def test_no_lead_without_ringattn_or_without_a_rival() -> None:
    assert tables.lead(tables.fastest(ROWS[1:])) is None
    assert tables.lead(tables.fastest(ROWS[:2])) is None


def test_operator_table_has_the_fastest_way_of_each_library() -> None:
    lines = tables.operator_table(ROWS, "loopback", gradient=False).splitlines()
    assert lines[0].split(" | ")[1] == "ringattn, ms"
    assert lines[2] == "| 4K, 8/2 x 64, causal | 1200 | 100 | 1800 | 9000 | – | torch | 1.50 |"
    assert len(lines) == 3
    assert "1 of 1 reach the aim of 1.1" in tables.lead_line(ROWS, "loopback", gradient=False)


def test_throttled_link_has_an_aim_of_its_own() -> None:
    rows = [OperatorRow(**{**vars(one), "link": "1gbit"}) for one in ROWS]
    assert "aim of 1.3" in tables.lead_line(rows, "1gbit", gradient=False)


def test_failures_keep_the_table_whole() -> None:
    lines = tables.failures(ROWS).splitlines()
    assert lines[2:] == ["| broken | own | causal, grouped heads | ValueError: no / kernel |"]
    assert tables.failures(ROWS[:2]) == "None failed."


def job(rate: str, way: str, attention: str, first: float, token: float) -> JobRow:
    return JobRow(rate, "larger", way, attention, 2048, [first, 3 * first, first], [token], 1e9, 2048e3, 1e-7)


def test_job_tables() -> None:
    rows = [
        job("1gbit", "mlx-lm, one host", "mlx", 30.0, 0.1),
        job("1gbit", "mlx-lm, tensor parallel", "mlx", 20.0, 0.05),
        job("10gbit", "mlx-lm, tensor parallel", "mlx", 16.0, 0.05),
        job("1gbit", "ringattn", "ringattn", 10.0, 0.1),
    ]
    assert "| 1gbit | ringattn | ringattn | 10.0 | 100 | 1000 | 1,000 |" in tables.job_table(rows, "larger")
    leads = tables.job_leads(rows, "larger").splitlines()[2:]
    assert leads == [
        "| 1gbit | 2K | mlx-lm, one host, mlx's attention | 3.00 | 1.00 |",
        "| 1gbit | 2K | mlx-lm, tensor parallel, mlx's attention | 2.00 | 0.50 |",
    ]


def test_computed_rows_have_the_rates_of_the_measured_host() -> None:
    measured = computed.shape(4)
    pairs = sum(kind.count * kind.pair_flops for kind in measured.prompt_attending)

    def one(prompt: int) -> JobRow:
        seconds = prompt * measured.prompt_linear / 1e11 + prompt**2 / 2 * pairs / 8e10 + 0.2
        return JobRow("1gbit", "larger", "mlx-lm, one host", "ringattn", prompt, [seconds], [0.2], 1e9, 0.0, 0.0)

    rows = [one(2048), one(8192), one(16384)]
    assert computed.computable(rows) and not computed.computable(rows[:1])
    found = computed.host(rows)
    assert found.flops == pytest.approx(1e11)
    assert found.attention == pytest.approx(8e10)
    lines = computed.computed_table(rows).splitlines()[2:]
    assert len(lines) == len(computed.HOSTS) * len(computed.PROMPTS)
    alone, ring = (float(cell) for cell in lines[0].split(" | ")[3:5])
    assert alone / 2 <= ring <= 0.6 * alone


def test_records_of_gpus() -> None:
    records = [
        {"what": "ringattn", "heads": [16, 16], "tokens": 32768, "ranks": 4, "gradient": False, "seconds": 0.5},
        {"what": "FLASH alltoall", "tokens": 32768, "ranks": 4, "gradient": False, "seconds": 1.0, "gpu": "NVIDIA H1"},
        {"what": "CUDNN alltoall", "tokens": 32768, "error": "no kernel"},
    ]
    where, *_, line = tables.gpu_table(records).splitlines()
    assert where.startswith("NVIDIA H1s of one host")
    assert line == "| 32K, 16/16 x 128, causal | 4 | forward | 500.0 | 1000.0 | – |"


def test_results_survive_their_file(tmp_path: Path) -> None:
    for rows in (ROWS, [job("1gbit", "ringattn", "ringattn", 1.0, 0.1)]):
        results.save(tmp_path / "results" / "one.json", rows)
        assert results.load(tmp_path / "results" / "one.json")["rows"] == rows


def test_section_is_replaced_and_the_rest_of_the_page_kept() -> None:
    once = page.replaced("# Title\n\ntext\n", f"{page.BEGIN}\nold\n{page.END}")
    assert page.replaced(f"{once}\n## After\n", f"{page.BEGIN}\nnew\n{page.END}") == (
        f"# Title\n\ntext\n\n{page.BEGIN}\nnew\n{page.END}\n\n## After\n"
    )


def test_part_on_gpus_stays() -> None:
    part = f"{page.ON_GPUS}\n\n| a |"
    assert page.gpu_part(f"text\n{page.BEGIN}\n\nold\n\n{part}\n\n{page.END}\n## After") == [part]
    assert page.gpu_part(f"{page.BEGIN}\nold\n{page.END}") == []


def test_first_answer_is_compared_with_float64(tmp_path: Path) -> None:
    out = exact_rows(TINY, np.arange(TINY.tokens)).astype(np.float32)
    wrong = out.copy()
    wrong[2, -1, 0] += 1
    for name, answer, least, most in (("wrong", wrong, 0.1, np.inf), ("right", out, 0.0, 1e-6)):
        (tmp_path / name).mkdir()
        assert least <= compare(TINY, np.arange(TINY.tokens), [answer], tmp_path / name)["out"] < most
        assert (tmp_path / name / "out.npy").exists() == (name == "right")  # a wrong one is no reference


def test_other_answers_are_compared_with_the_first_at_their_positions(tmp_path: Path) -> None:
    out = exact_rows(TINY, np.arange(TINY.tokens)).astype(np.float32)
    compare(TINY, np.arange(TINY.tokens), [out], tmp_path)
    mine = np.array([5, 1, 20])
    assert compare(TINY, mine, [out[:, mine]], tmp_path)["out"] == 0
    assert compare(TINY, mine, [out[:, np.sort(mine)]], tmp_path)["out"] > 1e-2


def test_exact_rows_of_a_uniform_softmax() -> None:
    problem = Problem(6, 2, 1, 4, causal=True, gradient=False)
    first = exact_rows(problem, np.array([0]))  # sees one key: its value
    assert np.allclose(first[:, 0], problem.arrays()[2][0, 0])


def test_nan_is_no_small_error() -> None:
    assert relative_error(np.array([np.nan, 1]), np.ones(2)) == float("inf")


def test_reason_names_the_cause_below_the_first_line() -> None:
    error = RuntimeError("Observed exception\n  Explanation: ...\n  raised NotImplementedError('X does not support Y')")
    assert one_line(error) == "RuntimeError: Observed exception raised NotImplementedError('X does not support Y')"


def test_problems_and_roster() -> None:
    few, whole = list(problems(whole=False)), list(problems(whole=True))
    assert set(few) < set(whole)
    assert {problem.tokens for problem in whole} == {4096, 8192, 16384}
    shapes = [problem.shape for problem in few]
    assert len(list(groupby(shapes))) == len(set(shapes)) == len(FEW)  # those of one shape come in a row
    assert ROSTER[0] is FIRST
    assert len({one.name for one in ROSTER}) == len(ROSTER)
    long = Problem(16384, 8, 8, 64, causal=False, gradient=True)
    assert OURS.memory(long) == 0
    square = next(one for one in ROSTER if one.square == 1)
    assert square.memory(long) > 3 * 4 * 8 * 16384**2


def test_commands_of_ranks_find_each_other() -> None:
    commands = starting.plain_commands("python", ["module", "x"], 2, None)
    assert [command.variables["RANK"] for command in commands] == ["0", "1"]
    assert len({command.variables["MASTER_PORT"] for command in commands}) == 1
    assert all(command.variables["OMP_NUM_THREADS"] == "1" for command in commands)


def test_failure_of_a_rank_is_the_reason_and_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "GRACE", 0.2)
    fails = (
        "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'done': [], 'failed': 'no kernel'})); sys.exit(1)"
    )
    commands = [
        starting.Command(["python3", "-c", fails, str(tmp_path / "f.0")], {}),
        starting.Command(["sleep", "100"], {}),
    ]
    with pytest.raises(starting.FailedError, match="no kernel"):
        starting.collect(commands, tmp_path / "f", 2, 60, None)


def test_results_before_a_failure_are_kept(tmp_path: Path) -> None:
    fails = "import sys; from benchmarks.rivals.worker import report; report(sys.argv[1], 0, (1 // n for n in (1, 0)))"
    command = starting.Command([sys.executable, "-c", fails, str(tmp_path / "f")], {})
    with pytest.raises(starting.FailedError, match="ZeroDivisionError") as caught:
        starting.collect([command], tmp_path / "f", 1, 60, None)
    assert caught.value.done == [[1]]


def started(fails: Problem, starts: list[tuple[str, list[Problem]]]):
    """A stand-in of `Piece._start`: every call takes a second, and `fails` fails."""

    def start(piece, rival, wanted, cluster, calls):
        starts.append((rival.name, list(wanted)))
        done = wanted[: wanted.index(fails)] if fails in wanted else wanted
        result = {"seconds": [1.0], "errors": {"out": 1e-7}, "versions": {}}
        return [(result,) * rival.ranks for _ in done], "" if len(done) == len(wanted) else "no kernel"

    return start


def test_a_rival_is_started_again_after_a_problem_that_it_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [one for one in problems(whole=False) if one.shape == FEW[0]]
    starts: list[tuple[str, list[Problem]]] = []
    monkeypatch.setattr(Piece, "_start", started(own[1], starts))
    rows: dict[tuple, OperatorRow] = {}
    assert list(Piece(own, "loopback", None, tmp_path, rows).run(2, lambda rival: rival is FIRST)) == [FIRST, FIRST]
    assert [one for _, one in starts] == [own, own[2:], [own[0], *own[2:]]]  # not again in the second round
    assert [row.failed for row in rows.values()] == ["", "no kernel", "", ""]
    assert [len(row.seconds) for row in rows.values()] == [2, 0, 2, 2]


def test_rivals_in_the_file_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[tuple[str, list[Problem]]] = []
    monkeypatch.setattr(Piece, "_start", started(TINY, starts))
    wanted = [one for one in problems(whole=False) if one.shape == FEW[1]]
    file = tmp_path / "results" / "f.json"

    def run(minutes: float) -> list[OperatorRow]:
        return Operator(["loopback"], 1, lambda rival: True, file).run(wanted, minutes)

    assert {row.rival for row in run(0)} == {FIRST.title}  # no other was started
    rows = run(1e9)
    assert {(row.rival, row.way) for row in rows} == {(one.title, one.way) for one in ROSTER}
    assert results.load(file)["rows"] == rows and all(row.measured for row in rows)
    assert [name for name, _ in starts] == [FIRST.name, FIRST.name, *(one.name for one in ROSTER[1:])]
    assert run(1e9) == rows and len(starts) == len(ROSTER) + 1


def test_samples_of_the_job_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[str] = []

    def collect(commands, file, ranks, timeout, cluster):
        starts.append(commands[0].line[-4])
        if starts[-1] == "tensor":
            raise starting.FailedError("no ring")
        return [
            [{"first": 2.0 + rank, "token": 0.1, "memory": 9.0, "sent": 8.0, "error": 0.0}] for rank in range(ranks)
        ]

    monkeypatch.setattr(job_module, "Cluster", lambda *_, **__: nullcontext(SimpleNamespace(addresses=["a", "b"])))
    monkeypatch.setattr(job_module, "unavailable", lambda: "")
    monkeypatch.setattr(job_module, "collect", collect)
    monkeypatch.setattr(job_module, "ring_command", lambda line, *_: [starting.Command(line, {})])
    wanted = [one for one in pieces(whole=False) if one.attention == "ringattn" and one.rate == "1gbit"]
    file = tmp_path / "results" / "job.json"
    once = Job(1, lambda way: True, file).run(wanted, 1e9)
    assert len(once) == len(wanted) * len(wanted[0].ways()) == len(starts)
    assert Job(1, lambda way: True, file).run(wanted, 1e9) == once and len(starts) == len(once)
    twice = Job(2, lambda way: True, file).run(wanted, 1e9)
    assert {(row.way, *row.first) for row in twice} == {
        ("mlx-lm, one host", 2.0, 2.0),
        ("mlx-lm, tensor parallel",),
        *((way, 3.0, 3.0) for way in ("mlx-lm --pipeline", "pipelined prefill", "ringattn")),
    }


def test_pieces_of_the_job_have_ringattn_beside_each_rival() -> None:
    for piece in pieces(whole=True):
        ways = piece.ways()
        assert ways[0].name == "one" and ways[-1].name == "ring"
        assert {way.attention for way in ways[:-1]} == {piece.attention}
    assert len(set(pieces(whole=False))) == len(list(pieces(whole=False)))


def test_slow_ranks_are_ended(tmp_path: Path) -> None:
    with pytest.raises(starting.FailedError, match="no answer within 0 s"):
        starting.collect([starting.Command(["sleep", "100"], {})], tmp_path / "f", 1, 0.2, None)


@pytest.mark.parametrize(
    "line",
    [
        "job --rates 1",
        "job --rates 1gbit,2gbit",
        "job --models large$",
        "job --ways none",
        "operator --only none",
        "operator --rivals none",
    ],
)
def test_nothing_to_run_is_an_error(line: str) -> None:
    _, option, given = line.split()
    with pytest.raises(SystemExit, match=f"^{option}: .* leaves nothing to run, expected some of: "):
        main(line.split())
