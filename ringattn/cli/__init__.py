"""The command ``ringattn``. A command's module is imported when the command is used."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

# What `ringattn --help` says of each command, so that the list of commands imports none of them.
COMMANDS = {
    "bench": "Time parts of ringattn on this machine.",
    "chat": "Talk to a language model whose context is spread over ranks.",
    "demo": "Let a real language model read a document on several processes.",
    "doctor": "Examine hosts, links and versions before a ring runs on them.",
    "generate": "Generate text with a language model whose context is spread over ranks.",
    "launch": "Run a program on several ranks, of this machine or of several hosts.",
    "serve": "Answer OpenAI-style requests with a language model spread over ranks.",
    "verify": "Check the ring against exact attention on this machine.",
}


class LazyGroup(click.Group):
    """A group that imports its commands late and says what is wrong with an option in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.commands.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _in_one_line():
            return super().invoke(ctx)


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        brief = click.ClickException(error.format_message())
        brief.exit_code = error.exit_code  # type: ignore[misc]  # click reads it from the instance
        raise brief from None


def _show_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib import metadata  # here: it takes as long as all else that this module imports

    try:
        version = metadata.version("ringattn")
    except metadata.PackageNotFoundError:
        version = "unknown (run from a checkout that is not installed)"
    click.echo(f"ringattn {version}")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
def main() -> None:
    """Exact attention over sequences that do not fit on one machine."""
