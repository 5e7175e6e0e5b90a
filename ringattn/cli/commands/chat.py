"""``ringattn chat``."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click

from ...transport.collectives import broadcast_bytes
from ..host_options import with_options
from ..lm_command import run
from ..lm_options import CONVERSATION, OPTIONS
from ..session import Session

HELP = "'q' ends, 'r' begins a new conversation, 'h' prints this help; Ctrl-C ends an answer."


@click.command()
@with_options(*OPTIONS, *CONVERSATION)
def chat(**options: Any) -> None:
    """Talk to an mlx-lm model whose context is spread over the ranks.

        ringattn chat -n 2 --model smollm2 --dtype float32

    'q' or the end of the input ends the conversation, 'r' begins a new one. --save-prompt-cache saves the conversation
    at its end; --prompt-cache-file continues it.

    Ctrl-C during an answer ends the answer, and at the prompt the conversation, like 'q'. A second Ctrl-C right after
    it ends all ranks. Under ringattn launch, Ctrl-C ends all ranks after at most 3 s, and the conversation may be lost.
    """
    run(_chat, "chat", options, forward_sigint=True)


class InterruptHandler:
    """Handler of Ctrl-C. On rank 0, Ctrl-C ends an answer, or at the prompt the conversation. Other ranks ignore it.

    Attributes:
        interrupted: Whether Ctrl-C was pressed since the last prompt.
    """

    def __init__(self, is_first: bool):
        self.interrupted = False
        self._at_prompt = False
        signal.signal(signal.SIGINT, self._handle if is_first else lambda *_: None)

    def _handle(self, *_: Any) -> None:
        if self._at_prompt or self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def read_line(self) -> bytes:
        """Read a line of standard input; empty at the end of the input and after Ctrl-C."""
        self._at_prompt = True
        try:
            return sys.stdin.buffer.readline()
        except KeyboardInterrupt:
            return b""
        finally:
            self._at_prompt = False
            self.interrupted = False


def _chat(session: Session) -> None:
    """Read and answer turns until the conversation ends."""
    interrupts = InterruptHandler(session.is_first)
    if session.is_first:
        click.echo(HELP, err=True)
    has_answer = False
    while (line := _read_turn(session, interrupts)) is not None and line != "q":
        if line == "r":
            session.reset()
            has_answer = False
        elif line == "h" and session.is_first:
            click.echo(HELP, err=True)
        elif line and line != "h":
            response = session.answer(session.tokens(line), stopped=lambda: interrupts.interrupted)
            has_answer = has_answer or response is not None
    if has_answer:
        session.save()


def _read_turn(session: Session, interrupts: InterruptHandler) -> str | None:
    """Line that the user enters at rank 0, on every rank; ``None`` at the end of the input. Collective."""
    message: bytes | None = None
    if session.is_first:
        click.echo(">> ", nl=False, err=True)
        line = interrupts.read_line()
        message = b"+" + line.strip() if line else b"-"
    received = broadcast_bytes(session.ring, message)
    return received[1:].decode(errors="replace") if received[:1] == b"+" else None
