"""Write the repository's address into what PyPI shows: the project's URLs and the links of the README.

    python -m tools.ci.repository_links https://github.com/OWNER/NAME REF

A checkout does not know its address, and a relative link leads nowhere on PyPI. The workflow that builds what is
published knows it, and runs this on its own checkout before the build.
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
    """The absolute address of a link's target in the README.

    Args:
        target: As it stands there: a path, an anchor, or an address, which is returned as it is.
        repository: The address of the repository, without a slash at the end.
        ref: The tag or commit that the address names.
        root: The folder of the README.

    Raises:
        FileNotFoundError: If there is no such file.
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
