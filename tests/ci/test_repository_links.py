"""What PyPI shows: links of the README that work there, and the addresses of the project."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tools.ci.repository_links import ROOT, TARGETS, absolute, main

REPOSITORY = "https://forge.example/somebody/ringattn"


@pytest.mark.parametrize(
    "target, expected",
    [
        ("https://elsewhere.example/x.png", "https://elsewhere.example/x.png"),
        ("mailto:somebody@elsewhere.example", "mailto:somebody@elsewhere.example"),
        ("docs/faults.md", f"{REPOSITORY}/blob/v1/docs/faults.md"),
        ("docs/faults.md#top", f"{REPOSITORY}/blob/v1/docs/faults.md#top"),
        ("docs/timeline.png", f"{REPOSITORY}/raw/v1/docs/timeline.png"),
        ("#two-commands", f"{REPOSITORY}/blob/v1/README.md#two-commands"),
    ],
)
def test_each_kind_of_target(target, expected):
    assert absolute(target, REPOSITORY, "v1") == expected


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"README.md: link to 'docs/none.md', expected a file"):
        absolute("docs/none.md", REPOSITORY, "v1")


def test_every_spelling_of_a_link_is_found():
    text = '[a](b.md) [![c](d.png)](e.md#f) <img src="g.svg" width=3> <a href="#h">\n[i]: j.md\nmake [k] (l) x(m)\n'
    assert [found[2] for found in TARGETS.finditer(text)] == ["b.md", "d.png", "e.md#f", "g.svg", "#h", "j.md"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout of which both files may be written."""
    for path in ROOT.iterdir():
        if path.name in ("README.md", "pyproject.toml"):
            shutil.copy(path, tmp_path)
        else:
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_the_readme_has_only_absolute_links_then(copy):
    assert any(not found[2].startswith("https:") for found in TARGETS.finditer((copy / "README.md").read_text()))
    main(REPOSITORY, "v1", copy)
    links = [found[2] for found in TARGETS.finditer((copy / "README.md").read_text())]
    assert links and all(link.startswith("https://") for link in links)
    assert f'\n[project.urls]\nRepository = "{REPOSITORY}"\n' in (copy / "pyproject.toml").read_text()


def test_it_runs_once(copy):
    main(REPOSITORY, "v1", copy)
    with pytest.raises(ValueError, match=r"\[project.urls\] is there already"):
        main(REPOSITORY, "v1", copy)


def test_the_citation_has_the_version_of_the_project():
    citation, project = ((ROOT / name).read_text() for name in ("CITATION.cff", "pyproject.toml"))
    version = re.search(r'^version = "(.*)"$', project, re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in citation
