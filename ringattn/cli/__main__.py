"""``python -m ringattn.cli`` is the command ``ringattn``."""

from . import main

main(prog_name="ringattn")
