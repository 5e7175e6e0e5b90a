"""``ringattn plan``: its output, its JSON, its measurements and its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ringattn.cli import main
from ringattn.doctor.compute_speed import ComputeSpeeds
from ringattn.planning.machines import CHIPS
from ringattn.reporting.hub import why_not_found

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from huggingface_hub import errors
from tiny_model import CONFIG, make_folder

ATTENTION = ("--heads", "32/8", "--context", "100000")
FOLDER = str(Path(__file__).parent)  # that is no model
CLUSTER = ("--machine", "4*m3-ultra:256G", "--link", "tb5-rdma")


def plan(*line: str) -> Result:
    return CliRunner().invoke(main, ["plan", *line])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("model")))


def test_attention_alone() -> None:
    done = plan(*ATTENTION, *CLUSTER)
    assert done.exit_code == 0, done.output
    assert "4 x m3-ultra" in done.output and "published measurement" in done.output
    assert "best: ring of 4" in done.output and "Layout.zigzag(n, size)" in done.output


def test_unequal_machines() -> None:
    done = plan(*ATTENTION, "--machine", "m3-ultra", "--machine", "m1-max")
    assert "Layout.weighted(n, [1." in done.output


def test_a_model_from_its_folder_and_from_its_configuration(folder: str, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**CONFIG, "vocab_size": 262, "torch_dtype": "float32"}))
    found = []
    for path in (folder, str(config)):
        file = tmp_path / "plan.json"
        done = plan("--model", path, "--dtype", "float32", "--context", "2000", *CLUSTER, "--json", str(file))
        assert done.exit_code == 0, done.output
        assert "run:  ringattn generate -n 4" in done.output and "grid of 2 rows of 2" in done.output
        found.append(json.loads(file.read_text()))
        del found[-1]["model"]["name"]
    assert found[0] == found[1]
    assert found[0]["best"] == found[0]["arrangements"][0]
    kinds = {one["arrangement"] for one in found[0]["arrangements"]}
    assert {"ring of 4", "grid of 2 rows of 2"} <= kinds
    assert found[0]["machines"][0]["count"] == 4


def test_generate_admits_what_was_promised(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest context of a plan is admitted, and one token more is not."""
    from ringattn import init, lm
    from ringattn.lm.host_memory import MEMORY
    from ringattn.lm.limits import least_room

    file = tmp_path / "plan.json"
    where = ("--machine", "1/10:300M", "--prefill-step-size", "64")
    assert plan("--model", folder, "--context", "100", *where, "--json", str(file)).exit_code == 0
    (promised,) = json.loads(file.read_text())["arrangements"]
    monkeypatch.setenv(MEMORY, "300M")
    model, _ = lm.load(folder)
    with init("solo") as ring:
        assert least_room(lm.shard(model, ring), ring, 64).longest == promised["longest_context"]


@pytest.mark.parametrize("tokens", [900, 5000, 20_000])
def test_rounds_are_those_of_generate(folder: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ringattn import init, lm
    from ringattn.lm.host_memory import MEMORY
    from ringattn.lm.rounds import agree_on_round
    from ringattn.planning import Job, Machine
    from ringattn.planning.choice import round_tokens
    from ringattn.planning.describe import read_shape

    monkeypatch.setenv(MEMORY, "290M")
    model, _ = lm.load(folder)
    with init("solo") as ring:
        rounds = agree_on_round(lm.shard(model, ring), ring, 0, tokens)
    machine = Machine("m", 1e12, 1e12, 1e11, 290 << 20)
    assert round_tokens(read_shape(folder), Job(tokens, gpu=False), [machine], [1.0]) == rounds


def test_what_does_not_fit(folder: str) -> None:
    done = plan("--model", folder, "--machine", "17/800:260M", "--context", "10000000")
    assert done.exit_code == 1
    assert "TOO LITTLE" in done.output and "does not fit: at most " in done.output
    done = plan("--model", folder, "--machine", "17/800:10M", "--context", "1")
    assert done.exit_code == 1
    assert "does not fit: the weights leave no room" in done.output


@pytest.mark.parametrize(("context", "warned"), [("64", False), ("65", True)])
def test_a_context_that_the_model_was_not_made_for(context: str, warned: bool, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**CONFIG, "vocab_size": 262, "max_position_embeddings": 64}))
    done = plan("--model", str(config), *CLUSTER, "--context", context)
    assert "made for contexts of 64 tokens" in done.output
    assert ("likely to be wrong" in done.output) is warned


def test_what_ringattn_does_not_run_is_marked() -> None:
    done = plan(*ATTENTION, "--machine", "16*m3-ultra", "--island", "4", "--link", "tb5-rdma", "--outer-link", "1gbe")
    assert "best: 4 rings of 4" in done.output and "ringattn does not run this arrangement" in done.output


def test_growth() -> None:
    done = plan(*ATTENTION, "--machine", "8*m4-max", "--growth")
    counts = [line.split()[0] for line in done.output.splitlines() if line[:1].isdigit() and " x " not in line]
    assert counts == ["8", "1", "2", "4"]


def test_the_rates_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured by the doctor in a process of its own."""
    done = plan("--heads", "2/1", "--head-dim", "32", "--dtype", "float32", "--context", "4096", "--measure")
    assert done.exit_code == 0, done.output
    assert "1 x " in done.output and "measured by the doctor" in done.output


@pytest.mark.parametrize(("given", "slow"), [((), True), (("--dtype", "float32"), False)])
def test_measured_rates_are_those_of_float32(folder: str, given: tuple[str, ...], slow: bool) -> None:
    """A CPU has no other rate of products."""
    done = plan("--model", folder, "--context", "64", "--measure", *given)
    assert done.exit_code == 0, done.output
    assert ("20 times more slowly" in done.output) is slow


def test_the_help_lists_all_chips_and_links() -> None:
    from ringattn.planning.links import LINKS

    shown = plan("--help").output
    assert all(name in shown for name in (*CHIPS, *LINKS))


@pytest.mark.parametrize(
    "line, message",
    [
        ((), "--model, --heads: expected one of them"),
        (("--heads", "32/8", "--model", "x"), "--model, --heads: expected one of them"),
        (("--heads", "32/5", *CLUSTER), "'32/5', expected query heads / key-value heads"),
        (ATTENTION, "--machine is missing"),
        ((*ATTENTION, "--machine", "m9"), "--machine: 'm9', expected"),
        ((*ATTENTION, "--machine", "m4:64"), "--machine m4:64: '64', expected at least 1M, such as 96G"),
        ((*ATTENTION, *CLUSTER, "--measure"), "--machine: given with --measure"),
        ((*ATTENTION, "--machine", "m4", "--link", "rope"), "--link: 'rope', expected"),
        ((*ATTENTION, *CLUSTER, "--island", "2"), "--island, --outer-link: expected both or neither"),
        ((*ATTENTION, *CLUSTER, "--island", "3", "--outer-link", "1gbe"), "--island: 3, expected a divisor of 4"),
        (
            (*ATTENTION, *CLUSTER, "--json", "/no/such/folder/plan.json"),
            "--json: /no/such/folder/plan.json: there is no",
        ),
        (
            (*ATTENTION, "--machine", "600*m1", "--machine", "600*m2"),
            "--machine: 1,200 machines, expected at most 1,024",
        ),
        ((*ATTENTION, *CLUSTER, "-n", "4", "--hosts", "a,b"), "-n, --hosts: only with --measure"),
        ((*ATTENTION, *CLUSTER, "--timeout", "120"), "--timeout: only with --measure"),
        ((*ATTENTION, "--measure", "--link", "10gbe"), "--link: not with --measure"),
        (("--model", "x", *CLUSTER, "--layers", "2"), "--layers: only with --heads"),
        (("--model", "/no/such/folder", *CLUSTER), "--model: /no/such/folder: no such file or folder"),
        (("--model", FOLDER, *CLUSTER), f"--model: {FOLDER}: expected a folder with a model's config.json"),
    ],
)
def test_errors_in_one_line(line: tuple[str, ...], message: str) -> None:
    done = plan(*line)
    assert done.exit_code != 0
    assert done.output.splitlines()[-1].startswith("Error: ") and message in done.output.splitlines()[-1]


def test_a_repository_that_cannot_be_reached_is_one_line_at_once() -> None:
    line = [sys.executable, "-m", "ringattn.cli", "plan", "--model", "nobody/nothing", *CLUSTER]
    nowhere = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=20, env=nowhere)  # retries take 23 s
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "Error: --model: nobody/nothing: no such folder, and Hugging Face cannot be reached: "
    )


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (errors.GatedRepoError, "Hugging Face gives it to who accepts its terms"),
        (errors.RepositoryNotFoundError, "Hugging Face has no such repository"),
        (errors.LocalEntryNotFoundError, "Hugging Face cannot be reached"),
        (errors.OfflineModeIsEnabled, "Hugging Face cannot be reached"),
        (errors.HFValidationError, "Hugging Face: its message"),
    ],
)
def test_why_a_model_was_not_found(kind: type[Exception], reason: str) -> None:
    assert why_not_found(kind.__new__(kind), "its message").startswith("no such folder, and ")
    assert reason in why_not_found(kind.__new__(kind), "its message")


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": "nothing"}', '{"model_type": "llama"}'])
def test_wrong_configurations_in_one_line(config: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(config)
    done = plan("--model", str(file), *CLUSTER)
    assert done.exit_code == 1 and done.output.startswith(f"Error: --model: {file}: ")
    assert ("expected a config.json of mlx-lm" in done.output) is ("model_type" not in config)
    assert len(done.output.splitlines()) == 1


def test_speeds_have_the_bandwidth_that_plans_need() -> None:
    assert "read" in ComputeSpeeds.__dataclass_fields__
