"""``ringattn generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .models import FILES, OPTIONS, Session, run, with_options


@click.command()
@with_options(*OPTIONS, *FILES)
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt; '-' reads it from standard input.")
@click.option(
    "--prompt-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text file, put before --prompt.",
)
@click.option("--ignore-chat-template", is_flag=True, help="Take the prompt as it is.")
def generate(ranks: int | None, **options: Any) -> None:
    """Generate text with an mlx-lm model whose context is spread over the ranks.

    Run it on several processes of this machine with -n, or on any ranks with ringattn launch or mpiexec:

        ringattn generate -n 4 --model smollm2 --prompt-file book.txt --prompt 'Who is the narrator?'
    """
    if options["prompt"] is None and options["prompt_file"] is None:
        raise click.UsageError("--prompt or --prompt-file is missing")
    run(_generate, "generate", ranks, options)


def _generate(session: Session) -> None:
    """One answer, and what it took."""
    options = session.options
    ids = session.tokens(_text(options), plain=options["ignore_chat_template"]) if session.speaks else []
    response = session.answer(ids)
    session.save()
    if session.speaks:
        held = sum(c.nbytes for c in session.cache) / 1e6
        click.echo(
            f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens/s. Generation: "
            f"{response.generation_tokens} tokens, {response.generation_tps:.1f} tokens/s. "
            f"Ranks: {session.ring.size}, keys and values on this one: {held:.1f} MB.",
            err=True,
        )


def _text(options: dict[str, Any]) -> str:
    """The prompt."""
    file, prompt = options["prompt_file"], options["prompt"]
    parts = [] if file is None else [file.read_text(encoding="utf-8")]
    if prompt is not None:
        parts.append(sys.stdin.read() if prompt == "-" else prompt.replace("\\n", "\n").replace("\\t", "\t"))
    return "\n\n".join(parts)
