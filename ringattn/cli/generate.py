"""``ringattn generate``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..errors import RingAttentionError


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
    if ranks is not None and ranks > 1:
        raise SystemExit(_on_ranks(ranks))
    with _errors():
        _generate(**options)


def _on_ranks(ranks: int) -> int:
    """This command again, on local ranks."""
    from ..cluster.local import run_local
    from ..cluster.mpiexec import LaunchError, build_command, build_environment, find_mpiexec

    arguments, given = sys.argv[1:], iter(sys.argv[1:])
    arguments = [argument for argument in given if not _is_ranks(argument, given)]
    try:
        line = build_command(find_mpiexec(None), ranks, [sys.executable, "-m", "ringattn.cli", *arguments])
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    return run_local(line, ranks=ranks, environment=build_environment(ranks, threads=None, timeout=None))


def _is_ranks(argument: str, following: Iterator[str]) -> bool:
    """Whether it is the option for the ranks, with the value that may come after it."""
    if argument in ("-n", "--ranks"):
        next(following)
        return True
    return argument.startswith(("--ranks=", "-n")) and argument[2:3] not in ("o",)


@contextmanager
def _errors() -> Iterator[None]:
    """What goes wrong as one line."""
    try:
        yield
    except RingAttentionError as error:
        raise click.ClickException(str(error)) from None
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{type(error).__name__}: {str(error).splitlines()[0]}") from None


def _generate(
    model: str,
    dtype: str | None,
    prompt: str | None,
    prompt_file: Path | None,
    max_tokens: int,
    temp: float,
    top_p: float,
    seed: int | None,
    ignore_chat_template: bool,
    prefill_step_size: int | None,
    prompt_cache_file: Path | None,
    save_prompt_cache: Path | None,
    weights: str | None,
) -> None:
    import mlx.core as mx

    from .. import init, lm

    with init() as ring:
        network, tokenizer = lm.load(model, getattr(mx, dtype) if dtype else None)
        lm.shard(network, ring, weights=None if weights is None else _numbers(weights))
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.sample_utils import make_sampler

        if prompt_cache_file is None:
            cache = make_prompt_cache(network)
        else:
            cache, metadata = lm.load_cache(prompt_cache_file, network)
            if metadata.get("model") != model:
                raise lm.CacheFileError(
                    f"{prompt_cache_file}: made with the model {metadata.get('model')}, not {model}"
                )
        if seed is not None:
            mx.random.seed(seed)
        ids = _ids(tokenizer, _text(prompt, prompt_file), ignore_chat_template) if ring.rank == 0 else []
        with _progress(ring.rank == 0) as shown:
            said = ""
            for response in lm.stream_generate(
                network,
                tokenizer,
                ids,
                max_tokens=max_tokens,
                sampler=make_sampler(temp, top_p),
                chunk=prefill_step_size,
                prompt_cache=cache,
                prompt_progress_callback=shown,
            ):
                said += response.text
                if ring.rank == 0:
                    click.echo(response.text, nl=False)
        if save_prompt_cache is not None:
            lm.save_cache(save_prompt_cache, cache, {"model": model})
        if ring.rank == 0:
            click.echo("" if said else "(no text)")
            held = sum(c.nbytes for c in cache) / 1e6
            click.echo(
                f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens/s; generation: "
                f"{response.generation_tokens} tokens, {response.generation_tps:.1f} tokens/s; "
                f"{ring.size} ranks, {held:.1f} MB of keys and values on this one",
                err=True,
            )


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{text!r}, expected numbers with commas between them", param_hint="--weights"
        ) from None


def _text(prompt: str | None, file: Path | None) -> str:
    parts = [] if file is None else [file.read_text(encoding="utf-8")]
    if prompt is not None:
        parts.append(sys.stdin.read() if prompt == "-" else prompt.replace("\\n", "\n").replace("\\t", "\t"))
    return "\n\n".join(parts)


def _ids(tokenizer: Any, text: str, ignore_chat_template: bool) -> list[int]:
    if ignore_chat_template or not tokenizer.has_chat_template:
        return list(tokenizer.encode(text))
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


@contextmanager
def _progress(wanted: bool) -> Iterator[Callable[[int, int], None]]:
    """A line about the prefill on standard error, with tokens per second and the time that is left."""
    start, live = time.monotonic(), wanted and sys.stderr.isatty()
    live = live or wanted and "RINGATTN_PROGRESS" in os.environ

    def show(done: int, total: int) -> None:
        if not live or total < 2:
            return
        seconds = max(time.monotonic() - start, 1e-9)
        rate = done / seconds
        left = f", {(total - done) / rate:.0f} s left" if 0 < done < total else ""
        click.echo(f"\rReading {done} of {total} tokens, {rate:.0f} tokens/s{left}   ", nl=done == total, err=True)

    yield show
