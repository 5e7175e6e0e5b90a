"""``ringattn samples``."""

from __future__ import annotations

import re
from pathlib import Path

import click

FOLDER = Path(__file__).parents[2] / "samples"  # links to launch/ and examples/ in a checkout, copies in a wheel
TITLE = re.compile(r'^(?:"""|# )(.*?)(?:""")?$', re.MULTILINE)  # first docstring, heading or comment


@click.command()
@click.argument("name", required=False)
def samples(name: str | None) -> None:
    """Print the sample NAME. Without NAME, list the samples: example programs, host files, the guide to several Macs.

    Save a sample before you run or change it: ringattn samples quickstart.py > quickstart.py
    """
    texts = {path.name: path.read_text() for path in sorted(FOLDER.glob("*/*")) if path.is_file()}
    if name is None:
        width = max(map(len, texts))
        click.echo("\n".join(f"{one:<{width}}  {_title(text)}".rstrip() for one, text in texts.items()))
    elif name in texts:
        click.echo(texts[name], nl=False)
    else:
        raise click.BadParameter(f"{name!r}, expected one of {', '.join(texts)}", param_hint="NAME")


def _title(text: str) -> str:
    match = TITLE.search(text)
    return match[1] if match else ""
