"""``ringattn chat``."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..comm.collectives import broadcast_bytes
from .models import FILES, OPTIONS, Session, run, with_options

HELP = "'q' ends, 'r' begins a new conversation, 'h' says this again."


@click.command()
@with_options(*OPTIONS, *FILES)
def chat(ranks: int | None, **options: Any) -> None:
    """Talk to an mlx-lm model whose context is spread over the ranks.

    'q' or the end of the input ends it, 'r' begins a new conversation. With --save-prompt-cache the conversation is
    saved in the end, and goes on with --prompt-cache-file.
    """
    run(_chat, "chat", ranks, options)


def _chat(session: Session) -> None:
    """Turn after turn."""
    if session.speaks:
        click.echo(HELP, err=True)
    said = False
    while (line := _asked(session)) is not None and line != "q":
        if line == "r":
            session.forget()
            said = False
        elif line == "h" and session.speaks:
            click.echo(HELP, err=True)
        elif line and line != "h":
            session.answer(session.tokens(line))
            said = True
    if said:
        session.save()


def _asked(session: Session) -> str | None:
    """What the user enters at rank 0, on every rank; ``None`` at the end of the input."""
    told: bytes | None = None
    if session.speaks:
        click.echo(">> ", nl=False, err=True)
        line = sys.stdin.readline()
        told = b"+" + line.strip().encode() if line else b"-"
    found = broadcast_bytes(session.ring, told)
    return found[1:].decode() if found[:1] == b"+" else None
