"""``python -m ringattn`` is the command ``ringattn``."""

from .cli import main

main(prog_name="ringattn")
