"""Start of the commands that run a language model: on which ranks, and with which model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from ..errors import ArgumentError, KernelWarning, MissingExtraError, VersionWarning
from ..extras import require
from ..reporting.hub import why_not_found
from ..transport.environment import launched_by
from ..transport.grid import Grid
from . import leave
from .output_files import problem_with_folder
from .progress_bar import is_visible
from .session import Session, names_of_options
from .starting import Placement, check_placement, start_again

SessionWork = Callable[[Session], int | None]
PromptReader = Callable[[dict[str, Any]], Any]

LONGEST_ERROR = 600  # characters of another library's message


def run(
    work: SessionWork,
    call: str,
    options: dict[str, Any],
    read: PromptReader | None = None,
    forward_sigint: bool = False,
) -> None:
    """Do `work` on a ring: on ranks that this command starts, on those of a launcher, or in this process alone.

    Args:
        work: Function of the session. Returns the exit code, or ``None`` for 0.
        call: Name of the command in the errors of other ranks.
        options: Options of the command.
        read: Function that makes the session's `text` of the options, on rank 0 before the model is loaded.
        forward_sigint: Whether the started ranks handle Ctrl-C themselves.
    """
    placement = Placement.pop_from(options)
    if launched_by() == "solo" and placement.starts_ranks:
        require("mlx_lm", "ringattn[lm]")  # before processes start
        leave(start_again(placement, forward_sigint))
    leave(_join_ring(work, call, placement, options, read))


def _join_ring(
    work: SessionWork, call: str, placement: Placement, options: dict[str, Any], read: PromptReader | None
) -> int:
    """Join the ring and do the work. Return the exit code.

    An error on one rank is an error on all ranks. Rank 0 prints it.
    """
    from .. import grid, init
    from ..ring.call import check_ring
    from ..transport.consensus import agree, raise_on_all_ranks

    with check_ring(init()) as ring, ExitStack() as stack:
        try:
            with raise_on_all_ranks(ring, call):
                check_placement(placement, ring)
                _check_save(options.get("save_prompt_cache"))
                _check_cache(options.get("prompt_cache_file") if ring.rank == 0 else None)
                text = read(options) if read and ring.rank == 0 else None
            agree(ring, call, tuple((name, str(value)) for name, value in options.items()))

            with names_of_options():
                arranged = stack.enter_context(grid(ring, options["tensor"]))
            if ring.rank == 0 and is_visible():
                click.echo(f"Loading {options['model']} ...", err=True)
            with warnings_in_one_line(ring.rank == 0):
                with raise_on_all_ranks(ring, call):
                    model, tokenizer = load_model(options, arranged)
                agree(ring, call)
                return work(Session(arranged, model, tokenizer, options, text)) or 0
        except (ArgumentError, MissingExtraError) as error:
            if ring.rank == 0:
                click.echo(f"Error: {error}", err=True)
            return 1


def _check_save(path: Path | None) -> None:
    """Fail before generating if the cache cannot be saved."""
    if path is not None and (problem := problem_with_folder(path)):
        raise ArgumentError(f"--save-prompt-cache: {path}: {problem}")


def _check_cache(path: Path | None) -> None:
    """Fail before the model is loaded if there is no cache to continue from."""
    from ..lm.prompt_cache.manifest import Manifest

    if path is None:
        return
    try:
        Manifest.read(path)
    except ArgumentError as error:
        raise ArgumentError(f"--prompt-cache-file: {error}") from None


@contextmanager
def warnings_in_one_line(is_first: bool) -> Iterator[None]:
    """Print each warning without the line of its source, and kernel warnings on the first rank only."""
    with warnings.catch_warnings():
        if not is_first:
            for kind in (KernelWarning, VersionWarning):
                warnings.simplefilter("ignore", kind)
        warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {message}", err=True)
        yield


def load_named(path: str, dtype: str | None, grid: Grid | None = None) -> tuple[Any, Any]:
    """Load model and tokenizer, with errors that name the options."""
    import mlx.core as mx

    from .. import lm

    try:
        with names_of_options():
            return lm.load(path, getattr(mx, dtype) if dtype else None, grid=grid)
    except MissingExtraError:
        raise
    except ArgumentError as error:
        raise ArgumentError(re.sub("^path:", "--model:", str(error))) from None
    except Exception as error:  # mlx-lm, MLX and the tokenizer raise anything for incomplete or foreign files
        message = _whole_in_one_line(error)
        if not Path(path).exists():
            message = why_not_found(error, message)
        raise ArgumentError(f"--model: {path}: {message}") from None


def load_model(options: dict[str, Any], grid: Grid | None = None) -> tuple[Any, Any]:
    """Load model and tokenizer, and check the options that depend on them."""
    model, tokenizer = load_named(options["model"], options["dtype"], grid)
    vocabulary = tokenizer.get_vocab()
    if options["top_k"] >= len(vocabulary):
        raise ArgumentError(f"--top-k: {options['top_k']}, expected less than {len(vocabulary)}, the model's tokens")
    for token in options.get("extra_eos_token", ()):
        if token not in vocabulary and not (token.isdecimal() and int(token) in vocabulary.values()):
            raise ArgumentError(f"--extra-eos-token: {token!r}, expected a token of the model, or its number")
        tokenizer.add_eos_token(token)
    return model, tokenizer


def _whole_in_one_line(error: Exception) -> str:
    """Whole message of an error in one line, with its type where the message alone is not clear."""
    message = " ".join(str(error).split())
    is_clear = message and isinstance(error, OSError | RuntimeError | ValueError)
    return (message if is_clear else f"{type(error).__name__}: {message}")[:LONGEST_ERROR]
