"""``ringattn chat``."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click

from ...transport.collectives import broadcast_bytes
from ..host_options import with_options
from ..lm_options import OPTIONS, TALK
from ..session import Session, run

HELP = "'q' ends, 'r' begins a new conversation, 'h' says this again; Ctrl-C ends an answer."


@click.command()
@with_options(*OPTIONS, *TALK)
def chat(**options: Any) -> None:
    """Talk to an mlx-lm model whose context is spread over the ranks.

        ringattn chat -n 2 --model smollm2 --dtype float32

    'q' or the end of the input ends it, 'r' begins a new conversation. With --save-prompt-cache the conversation is
    saved in the end, and goes on with --prompt-cache-file.

    Ctrl-C ends an answer, and at the prompt the conversation, as 'q' does; twice at once it ends all ranks. Under
    ringattn launch it ends all ranks after at most 3 s, saved or not.
    """
    run(_chat, "chat", options, forward_sigint=True)


class Interrupts:
    """Ctrl-C: on rank 0 it ends an answer, or the conversation at the prompt; the other ranks do what rank 0 does.

    Attributes:
        came: Whether it was pressed since the last answer began.
    """

    def __init__(self, speaks: bool):
        self.came = self._asking = False
        signal.signal(signal.SIGINT, self._take if speaks else lambda *_: None)

    def _take(self, *_: Any) -> None:
        if self._asking or self.came:
            raise KeyboardInterrupt
        self.came = True

    def line(self) -> bytes:
        """What is entered next; nothing at the end of the input, or of the user's patience."""
        self._asking = True
        try:
            return sys.stdin.buffer.readline()
        except KeyboardInterrupt:
            return b""
        finally:
            self._asking = self.came = False


def _chat(session: Session) -> None:
    """Turn after turn."""
    interrupts = Interrupts(session.speaks)
    if session.speaks:
        click.echo(HELP, err=True)
    said = False
    while (line := _asked(session, interrupts)) is not None and line != "q":
        if line == "r":
            session.forget()
            said = False
        elif line == "h" and session.speaks:
            click.echo(HELP, err=True)
        elif line and line != "h":
            said = session.answer(session.tokens(line), stopped=lambda: interrupts.came) is not None or said
    if said:
        session.save()


def _asked(session: Session, interrupts: Interrupts) -> str | None:
    """What the user enters at rank 0, on every rank; ``None`` at the end of the input."""
    told: bytes | None = None
    if session.speaks:
        click.echo(">> ", nl=False, err=True)
        line = interrupts.line()
        told = b"+" + line.strip() if line else b"-"
    found = broadcast_bytes(session.ring, told)
    return found[1:].decode(errors="replace") if found[:1] == b"+" else None
