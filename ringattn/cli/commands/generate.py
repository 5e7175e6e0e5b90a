"""``ringattn generate``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from ...errors import ArgumentError
from ..host_options import with_options
from ..lm_command import run
from ..lm_options import CONVERSATION, OPTIONS
from ..session import Session


@click.command()
@with_options(*OPTIONS, *CONVERSATION)
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt; '-' reads it from standard input.")
@click.option(
    "--prompt-file", type=click.Path(dir_okay=False, path_type=Path), help="A text file that comes before --prompt."
)
@click.option("--ignore-chat-template", is_flag=True, help="Use the prompt without the model's chat template.")
def generate(**options: Any) -> None:
    """Generate text with an mlx-lm model whose context is spread over the ranks.

    Run it on several processes of this machine with -n, or on any ranks with ringattn launch or mpiexec:

        ringattn generate -n 4 --model smollm2 --dtype float32 --prompt-file book.txt --prompt 'Who tells it?'
    """
    if options["prompt"] is None and options["prompt_file"] is None:
        raise click.UsageError("--prompt or --prompt-file is missing")
    if options["system_prompt"] is not None and options["prompt_cache_file"] is not None:
        raise click.UsageError("--system-prompt: given with --prompt-cache-file, which goes on after a first turn")
    run(_generate, "generate", options, _text)


def _generate(session: Session) -> None:
    """Generate an answer and print its statistics."""
    from ...lm.sharding.sharded_cache import contents, held_bytes

    options = session.options
    response = session.answer(session.tokens(session.text, plain=options["ignore_chat_template"]))
    session.save()
    if session.is_first:
        held = held_bytes(session.cache) / 1e6
        tensor = session.grid.tensor
        rows = f" in rows of {tensor}" if tensor > 1 else ""
        click.echo(
            f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens/s. Generation: "
            f"{response.generation_tokens} tokens, {response.generation_tps:.1f} tokens/s. "
            f"Ranks: {session.ring.size}{rows}, {contents(session.cache)} on this one: {held:.1f} MB.",
            err=True,
        )


def _text(options: dict[str, Any]) -> str:
    """Prompt from the file and the command line."""
    file = options["prompt_file"]
    prompt = options["prompt"]
    parts = [] if file is None else [_not_empty(f"--prompt-file: {file}", _bytes(file))]
    if prompt == "-":
        parts.append(_not_empty("--prompt: standard input", sys.stdin.buffer.read()))
    elif prompt is not None:
        parts.append(_decoded("--prompt", os.fsencode(prompt)).replace("\\n", "\n").replace("\\t", "\t"))
    return "\n\n".join(parts)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ArgumentError(f"--prompt-file: {file}: {error.strerror}") from None


def _not_empty(what: str, text: bytes) -> str:
    """Text of a file or of standard input, without a byte order mark. To an empty one a model would answer anything."""
    decoded = _decoded(what, text).removeprefix("\ufeff")
    if not decoded:
        raise ArgumentError(f"{what}: empty, expected a text")
    return decoded


def _decoded(what: str, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{what}: {error.reason} at byte {error.start}, expected UTF-8") from None
