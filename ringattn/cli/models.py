"""What the commands that run a language model share: their options, the ring, the model, and saying an answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ..comm import launched_by
from ..comm.base import Ring
from ..errors import ArgumentError, MissingExtraError

OPTIONS = (
    click.option(
        "-n",
        "--ranks",
        type=click.IntRange(min=1),
        metavar="N",
        help="Processes of this machine to spread it over; not under ringattn launch or mpiexec.",
    ),
    click.option(
        "--model",
        required=True,
        metavar="PATH",
        help="A folder or Hugging Face repository that mlx-lm loads, a Llama GGUF file, or 'smollm2'.",
    ),
    click.option(
        "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Turn floating-point weights into it."
    ),
    click.option(
        "-m",
        "--max-tokens",
        default=256,
        show_default=True,
        type=click.IntRange(min=1),
        help="Tokens of an answer at most.",
    ),
    click.option("--temp", default=0.0, show_default=True, type=click.FloatRange(min=0), help="Sampling temperature."),
    click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1), help="Sampling top-p."),
    click.option("--seed", type=int, help="Seed of the sampling."),
    click.option(
        "--prefill-step-size",
        type=click.IntRange(min=1),
        metavar="TOKENS",
        help="Tokens a rank computes in one round of prefill.  [default: 2048 on a CPU, 8192 on a GPU]",
    ),
    click.option("--weights", metavar="W,W,...", help="How fast the ranks are: their shares of prefill and cache."),
)

FILES = (
    click.option(
        "--prompt-cache-file", type=click.Path(dir_okay=False, path_type=Path), help="Go on from this prompt cache."
    ),
    click.option(
        "--save-prompt-cache",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Save the cache of all that was said here, a file for each rank beside it.",
    ),
)


def with_options(*options: Callable) -> Callable[[Callable], Callable]:
    """A decorator that gives a command these options, in this order."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def run(work: Callable[[Session], None], what: str, ranks: int | None, options: dict[str, Any]) -> None:
    """Do `work` on a ring: on local ranks that are started, on those of a launcher, or in this process alone."""
    if ranks is not None and ranks > 1 and launched_by() == "solo":
        raise SystemExit(_on_ranks(ranks))
    raise SystemExit(_on_a_ring(work, what, options))


def _on_ranks(ranks: int) -> int:
    """This command again, on local ranks, which find themselves under a launcher."""
    from ..cluster.job import run as run_ranks
    from ..cluster.mpiexec import LaunchError, build_command, build_environment, find_mpiexec

    try:
        line = build_command(find_mpiexec(None), ranks, [sys.executable, "-m", "ringattn.cli", *sys.argv[1:]])
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    return run_ranks(line, ranks=ranks, environment=build_environment())


def _on_a_ring(work: Callable[[Session], None], what: str, options: dict[str, Any]) -> int:
    """Join the ring and do the work; the exit status. What is wrong on one rank is an error on all, told by rank 0."""
    from .. import init
    from ..comm.agreement import agree, heard

    with init() as ring:
        try:
            with heard(ring, what):
                model, tokenizer = _loaded(options)
            agree(ring, what, tuple((name, str(value)) for name, value in options.items()))
            work(Session(ring, model, tokenizer, options))
        except (ArgumentError, MissingExtraError) as error:
            if ring.rank == 0:
                click.echo(f"Error: {error}", err=True)
            return 1
    return 0


def _loaded(options: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer."""
    import mlx.core as mx

    from .. import lm

    try:
        return lm.load(options["model"], getattr(mx, options["dtype"]) if options["dtype"] else None)
    except (OSError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArgumentError(f"--model: {options['model']}: {told}") from None


class Session:
    """A model on a ring, and the cache of what was said."""

    def __init__(self, ring: Ring, model: Any, tokenizer: Any, options: dict[str, Any]):
        """`options` are the command's."""
        import mlx.core as mx

        from .. import lm

        self.ring, self.model, self.tokenizer, self.options = ring, model, tokenizer, options
        weights, file = options["weights"], options.get("prompt_cache_file")
        lm.shard(model, ring, weights=None if weights is None else _numbers(weights))
        if options["seed"] is not None:
            mx.random.seed(options["seed"])
        if file is None:
            self.forget()
            return
        self.cache, metadata = lm.load_cache(file, model)
        if metadata.get("model") != options["model"]:
            raise lm.CacheFileError(f"{file}: made with model {metadata.get('model')}, expected {options['model']}")

    @property
    def speaks(self) -> bool:
        """Whether this rank reads and writes for all."""
        return self.ring.rank == 0

    def forget(self) -> None:
        """Begin again."""
        self.cache = self.model.make_cache()

    def tokens(self, text: str, plain: bool = False) -> list[int]:
        """A user's turn, in the model's chat template unless it is to be `plain`."""
        if plain or not self.tokenizer.has_chat_template:
            return list(self.tokenizer.encode(text))
        messages = [{"role": "user", "content": text}]
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True))

    def answer(self, ids: Sequence[int]) -> Any:
        """Generate, and print what comes on rank 0; mlx-lm's last response."""
        from mlx_lm.sample_utils import make_sampler

        from .. import lm

        options = self.options
        for response in lm.stream_generate(
            self.model,
            self.tokenizer,
            ids,
            max_tokens=options["max_tokens"],
            sampler=make_sampler(options["temp"], options["top_p"]),
            chunk=options["prefill_step_size"],
            prompt_cache=self.cache,
            prompt_progress_callback=_Progress() if self.speaks and sys.stderr.isatty() else None,
        ):
            if self.speaks:
                click.echo(response.text, nl=False)
        if self.speaks:
            click.echo()
        return response

    def save(self) -> None:
        """Write the cache where that is asked for."""
        from .. import lm

        if self.options["save_prompt_cache"] is not None:
            lm.save_cache(self.options["save_prompt_cache"], self.cache, {"model": self.options["model"]})


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ArgumentError(f"--weights: {text!r}, expected numbers with commas between them") from None


class _Progress:
    """A line about the prefill on standard error, with tokens per second and the time that is left."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        rate = done / max(time.monotonic() - self.start, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if 0 < done < total else ""
        click.echo(f"\rReading {done} of {total} tokens, {rate:.0f} tokens/s{left}    ", nl=done == total, err=True)
