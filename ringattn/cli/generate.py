"""``ringattn generate``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from ..comm import launched_by
from ..comm.base import Ring
from ..errors import ArgumentError, MissingExtraError


@click.command()
@click.option(
    "-n",
    "--ranks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes of this machine to spread it over; not under ringattn launch or mpiexec.",
)
@click.option(
    "--model",
    required=True,
    metavar="PATH",
    help="A folder or Hugging Face repository that mlx-lm loads, a Llama GGUF file, or 'smollm2'.",
)
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Turn floating-point weights into it."
)
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt; '-' reads it from standard input.")
@click.option(
    "--prompt-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text file, put before --prompt.",
)
@click.option(
    "-m", "--max-tokens", default=100, show_default=True, type=click.IntRange(min=1), help="Tokens to generate."
)
@click.option("--temp", default=0.0, show_default=True, type=click.FloatRange(min=0), help="Sampling temperature.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1), help="Sampling top-p.")
@click.option("--seed", type=int, help="Seed of the sampling.")
@click.option("--ignore-chat-template", is_flag=True, help="Take the prompt as it is.")
@click.option(
    "--prefill-step-size",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Tokens a rank computes in one round of prefill.  [default: 2048 on a CPU, 8192 on a GPU]",
)
@click.option(
    "--prompt-cache-file", type=click.Path(dir_okay=False, path_type=Path), help="Go on from this prompt cache."
)
@click.option(
    "--save-prompt-cache",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Save the cache of prompt and answer here, a file for each rank beside it.",
)
@click.option("--weights", metavar="W,W,...", help="How fast the ranks are: their shares of prefill and cache.")
def generate(ranks: int | None, **options: Any) -> None:
    """Generate text with an mlx-lm model whose context is spread over the ranks.

    Run it on several processes of this machine with -n, or on any ranks with ringattn launch or mpiexec:

        ringattn generate -n 4 --model smollm2 --prompt-file book.txt --prompt 'Who is the narrator?'
    """
    if options["prompt"] is None and options["prompt_file"] is None:
        raise click.UsageError("--prompt or --prompt-file is missing")
    if ranks is not None and ranks > 1 and launched_by() == "solo":
        raise SystemExit(_on_ranks(ranks))
    raise SystemExit(_on_a_ring(options))


def _on_ranks(ranks: int) -> int:
    """This command again, on local ranks, which find themselves under a launcher."""
    from ..cluster.local import run_local
    from ..cluster.mpiexec import LaunchError, build_command, build_environment, find_mpiexec

    try:
        line = build_command(find_mpiexec(None), ranks, [sys.executable, "-m", "ringattn.cli", *sys.argv[1:]])
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    return run_local(line, ranks=ranks, environment=build_environment(ranks, threads=None, timeout=None))


def _on_a_ring(options: dict[str, Any]) -> int:
    """Join the ring and generate; the exit status. What is wrong on one rank is an error on all, told by rank 0."""
    from .. import init
    from ..comm.agreement import agree, heard

    with init() as ring:
        try:
            with heard(ring, "generate"):
                network, tokenizer = _loaded(options)
            agree(ring, "generate", tuple((name, str(value)) for name, value in options.items()))
            _generate(ring, network, tokenizer, options)
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


def _generate(ring: Ring, network: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    """Read the prompt, say the answer as it comes, save what is to be saved."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.sample_utils import make_sampler

    from .. import lm

    weights = options["weights"]
    lm.shard(network, ring, weights=None if weights is None else _numbers(weights))
    file = options["prompt_cache_file"]
    cache, metadata = (make_prompt_cache(network), {}) if file is None else lm.load_cache(file, network)
    if file is not None and metadata.get("model") != options["model"]:
        raise lm.CacheFileError(f"{file}: made with model {metadata.get('model')}, expected {options['model']}")
    if options["seed"] is not None:
        mx.random.seed(options["seed"])
    speaker = ring.rank == 0
    for response in lm.stream_generate(
        network,
        tokenizer,
        _ids(tokenizer, options) if speaker else [],
        max_tokens=options["max_tokens"],
        sampler=make_sampler(options["temp"], options["top_p"]),
        chunk=options["prefill_step_size"],
        prompt_cache=cache,
        prompt_progress_callback=_Progress() if speaker and sys.stderr.isatty() else None,
    ):
        if speaker:
            click.echo(response.text, nl=False)
    if options["save_prompt_cache"] is not None:
        lm.save_cache(options["save_prompt_cache"], cache, {"model": options["model"]})
    if speaker:
        held = sum(c.nbytes for c in cache) / 1e6
        click.echo()
        click.echo(
            f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens/s. Generation: "
            f"{response.generation_tokens} tokens, {response.generation_tps:.1f} tokens/s. "
            f"Ranks: {ring.size}, keys and values on this one: {held:.1f} MB.",
            err=True,
        )


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{text!r}, expected numbers with commas between them", param_hint="--weights"
        ) from None


def _ids(tokenizer: Any, options: dict[str, Any]) -> list[int]:
    """The prompt's tokens."""
    file, prompt = options["prompt_file"], options["prompt"]
    parts = [] if file is None else [file.read_text(encoding="utf-8")]
    if prompt is not None:
        parts.append(sys.stdin.read() if prompt == "-" else prompt.replace("\\n", "\n").replace("\\t", "\t"))
    text = "\n\n".join(parts)
    if options["ignore_chat_template"] or not tokenizer.has_chat_template:
        return list(tokenizer.encode(text))
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


class _Progress:
    """A line about the prefill on standard error, with tokens per second and the time that is left."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        rate = done / max(time.monotonic() - self.start, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if 0 < done < total else ""
        click.echo(f"\rReading {done} of {total} tokens, {rate:.0f} tokens/s{left}    ", nl=done == total, err=True)
