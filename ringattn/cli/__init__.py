"""Command line ``ringattn``. The module of a command is imported when the command is used."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from ..errors import RingAttentionError

FULL = (errno.ENOSPC, errno.EDQUOT)  # no fault of the program
INTERRUPTED = 130  # exit code after Ctrl-C: 128 and the number of SIGINT

# Lines of `ringattn --help`, here so that the list of commands imports none of them.
COMMANDS = {
    "bench": "Time kernels, rings, links and models, and compare with an earlier run.",
    "chat": "Talk to a language model whose context is spread over ranks.",
    "demo": "Let a real language model read a document on several processes.",
    "doctor": "Examine hosts, links and versions before a ring runs on them.",
    "generate": "Generate text with a language model whose context is spread over ranks.",
    "launch": "Run a program on several ranks, of this machine or of several hosts.",
    "plan": "Predict memory and time of a model on a cluster, and choose how its machines share the work.",
    "samples": "Print an example program, a host file, or the guide to several machines.",
    "serve": "Answer OpenAI-style requests with a language model spread over ranks.",
    "verify": "Check the ring against exact attention on this machine.",
}


class LazyGroup(click.Group):
    """Group that imports its commands late, and prints one line for a wrong option, an error or Ctrl-C."""

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
        _open_standard_streams()
        with _in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _in_one_line():
            return super().invoke(ctx)


def _open_standard_streams() -> None:
    """Open those that were closed before the start on the null device.

    Otherwise the next file would get the number of one: MLX takes a file with number 0 for closed, and what libraries
    print would be written into another file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            file = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(file, True)  # for mpiexec
            setattr(sys, name, os.fdopen(file, mode))


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        raise _brief(error.format_message(), error.exit_code) from None
    except RingAttentionError as error:
        raise _brief(str(error), getattr(error, "exit_code", 1)) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _brief(f"{error.filename or 'output'}: {error.strerror}", 1) from None
    except KeyboardInterrupt:
        if os.environ.get("RINGATTN_LAUNCH") != "1":  # else the launcher prints it, once for all ranks
            click.echo("\nInterrupted." if sys.stderr.isatty() else "Interrupted.", err=True)  # after a terminal's ^C
        raise SystemExit(INTERRUPTED) from None


def leave(code: int) -> NoReturn:
    """End a command with the exit code of its ranks or of its work."""
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    raise SystemExit(code)


def _brief(message: str, exit_code: int) -> click.ClickException:
    brief = click.ClickException(message)
    brief.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance
    return brief


def _show_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib import metadata  # late: this import takes as long as all others of this module together

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
