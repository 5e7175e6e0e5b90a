"""Rewriting of the project's URLs and the README's links, so that PyPI shows the repository's address.

    python -m tools.ci.repository_links https://github.com/OWNER/NAME REF

A checkout does not know its address, and relative links do not work on PyPI. The workflow that builds the published
files knows the address, and runs this on its checkout before the build.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGETS = re.compile(r"""(\]\(|(?:src|href)="|^\[[^\]]+\]:[ ]+)([^)"\s]+)""", re.MULTILINE)
ABSOLUTE = re.compile(r"[a-z]+:")
PICTURES = {".gif", ".jpg", ".png", ".svg"}
URLS = """
[project.urls]
Repository = "{repository}"
Documentation = "{repository}/tree/{ref}/docs"
Issues = "{repository}/issues"
Changelog = "{repository}/blob/{ref}/CHANGELOG.md"
"""


def absolute(target: str, repository: str, ref: str, root: Path = ROOT) -> str:
    """Make the absolute address of a link's target in the README.

    Args:
        target: The target in the README: a path, an anchor, or an address, which is returned unchanged.
        repository: The address of the repository, without a slash at the end.
        ref: The tag or commit that the address names.
        root: The folder of the README.

    Raises:
        FileNotFoundError: If the file does not exist.
    """
    if ABSOLUTE.match(target):
        return target
    path, _, anchor = target.partition("#")
    path = path or "README.md"
    if not (root / path).exists():
        raise FileNotFoundError(f"README.md: link to {target!r}, expected a file of the repository")
    view = "raw" if Path(path).suffix in PICTURES else "blob"
    return f"{repository}/{view}/{ref}/{path}" + (f"#{anchor}" if anchor else "")


def main(repository: str, ref: str, root: Path = ROOT) -> None:
    """Rewrite README.md and pyproject.toml under `root`."""
    readme, project = root / "README.md", root / "pyproject.toml"
    if "[project.urls]" in project.read_text():
        raise ValueError("pyproject.toml: [project.urls] is there already, expected a fresh checkout")
    text = TARGETS.sub(lambda link: link[1] + absolute(link[2], repository, ref, root), readme.read_text())
    readme.write_text(text)
    project.write_text(project.read_text() + URLS.format(repository=repository, ref=ref))


if __name__ == "__main__":
    main(*sys.argv[1:])
