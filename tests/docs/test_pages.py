"""Documentation: its examples run, and the commands and options that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click import Context, Group
from click.testing import CliRunner
from spawn import ROOT

from ringattn.cli import COMMANDS, main
from ringattn.tracing.files import SUFFIXES, VARIABLE

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
READ_IN_A_CHECKOUT = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "launch/README.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:sudo )?ringattn (\S+)(.*)$", re.MULTILINE)
RUN_AS_THEY_STAND = ("library.md",)


def test_there_are_pages() -> None:
    assert len(PAGES) > 10


@pytest.mark.parametrize("name", RUN_AS_THEY_STAND)
def test_examples_run(name: str) -> None:
    """Run the examples of a page one after the other, in one namespace."""
    text = (ROOT / "docs" / name).read_text()
    examples = PYTHON.findall(text)
    assert len(examples) > 5
    scope: dict = {}
    for example in examples:
        exec(compile(example, name, "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_are_python(page: Path) -> None:
    for example in PYTHON.findall(page.read_text()):
        compile(example, page.name, "exec")


@pytest.mark.parametrize("page", READ_IN_A_CHECKOUT, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_readme_leads_to_no_page_that_only_the_site_fills() -> None:
    """Such a page includes another file, and in a checkout it is the name of that file alone."""
    links = re.findall(r"\]\((docs/[^)#]+\.md)", (ROOT / "README.md").read_text())
    assert links and not any("--8<--" in (ROOT / link).read_text() for link in links)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    for command, arguments in COMMAND.findall(page.read_text()):
        assert command in COMMANDS or command == "--help", command
        line = [command, *subcommand(command, arguments)]
        shown = CliRunner().invoke(main, [*line, "--help"]).output if command in COMMANDS else ""
        own = re.split(r" -- |#", arguments)[0]  # less the program's own arguments, and comments
        for option in re.findall(r"(?<=\s)--?[a-z][\w-]*", own):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown), f"ringattn {' '.join(line)} has no {option}"


def subcommand(command: str, arguments: str) -> list[str]:
    """The word after the name of a group of commands."""
    known = main.get_command(Context(main), command)
    return arguments.split()[:1] if isinstance(known, Group) else []


def test_every_benchmark_has_an_example() -> None:
    known = main.get_command(Context(main), "bench")
    assert isinstance(known, Group)
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in known.commands:
        assert re.search(rf"^ringattn bench {name}", text, re.MULTILINE), name


def test_traces_are_documented() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for word in ("--trace", VARIABLE, *SUFFIXES):
        assert f"`{word}" in text or f" {word}" in text, word
