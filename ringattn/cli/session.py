"""What the commands that run a language model share: the ring, the model, and saying an answer."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..errors import ArgumentError, KernelWarning, MissingExtraError
from ..extras import require
from ..transport.base import Ring
from ..transport.environment import launched_by
from . import leave
from .progress_bar import bar, shown
from .starting import Place, prepare

Work = Callable[["Session"], int | None]
Read = Callable[[dict[str, Any]], Any]
STARTED = "RINGATTN_STARTED"  # set for ranks that one of these commands has started itself


def run(work: Work, what: str, options: dict[str, Any], read: Read | None = None, patient: bool = False) -> None:
    """Do `work` on a ring: on ranks that are started, on those of a launcher, or in this process alone.

    Before the model is loaded, `read` gets the options on rank 0; what it gives is the session's `text`. With
    `patient`, the ranks that are started decide themselves what Ctrl-C means. `work` gives the exit code, where that is
    not 0.
    """
    place = Place.taken_from(options)
    if launched_by() == "solo" and place.elsewhere:
        leave(_on_ranks(place, patient))
    leave(_on_a_ring(work, what, place, options, read))


def _on_ranks(place: Place, patient: bool) -> int:
    """This command again, on ranks that find themselves under a launcher."""
    require("mlx_lm", "ringattn[lm]")  # before processes start
    own = replace(place, variables=(*place.variables, f"{STARTED}=1"))
    if place.hosts is None and place.hostfile is None:
        own = replace(own, ranks=place.ranks or 1)
    ranks = prepare(own, [sys.executable, "-m", "ringattn.cli", *sys.argv[1:]], prefix=False)
    return ranks.run(patient=patient, explained=True)


def _on_a_ring(work: Work, what: str, place: Place, options: dict[str, Any], read: Read | None) -> int:
    """Join the ring and do the work; the exit code. What is wrong on one rank is an error on all, told by rank 0."""
    from .. import init
    from ..transport.consensus import agree, heard

    with init() as ring:
        try:
            with heard(ring, what):
                _check_place(place, ring)
                _check_save(options.get("save_prompt_cache"))
                text = read(options) if read and ring.rank == 0 else None
            agree(ring, what, tuple((name, str(value)) for name, value in options.items()))
            if ring.rank == 0 and shown():
                click.echo(f"Loading {options['model']} ...", err=True)
            with heard(ring, what), _warnings_in_one_line(ring.rank == 0):
                model, tokenizer = _loaded(options)
            agree(ring, what)
            return work(Session(ring, model, tokenizer, options, text)) or 0
        except (ArgumentError, MissingExtraError) as error:
            if ring.rank == 0:
                click.echo(f"Error: {error}", err=True)
            return 1


def _check_place(place: Place, ring: Ring) -> None:
    """Refuse options of a place where a launcher has chosen it."""
    if place.given and STARTED not in os.environ and launched_by() != "solo":
        raise ArgumentError(f"{', '.join(place.given)}: given under a launcher, which has started {ring.size} ranks")


@contextmanager
def _warnings_in_one_line(speaks: bool) -> Iterator[None]:
    """What the loader warns of, once for all ranks and without a line of its source."""
    with warnings.catch_warnings():
        if not speaks:
            warnings.simplefilter("ignore", KernelWarning)
        warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {message}", err=True)
        yield


def _check_save(path: Path | None) -> None:
    """Fail before generating if the cache cannot be saved."""
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
        raise ArgumentError(f"--save-prompt-cache: {path}, expected a file in a folder that can be written to")


def _loaded(options: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer."""
    import mlx.core as mx

    from .. import lm

    try:
        model, tokenizer = lm.load(options["model"], getattr(mx, options["dtype"]) if options["dtype"] else None)
    except MissingExtraError:
        raise
    except ArgumentError as error:
        raise ArgumentError(re.sub("^path:", "--model:", str(error))) from None
    except Exception as error:  # whatever mlx-lm, MLX and the tokenizer say to files that are torn or something else
        source = "" if Path(options["model"]).exists() else "no such folder, and Hugging Face: "
        raise ArgumentError(f"--model: {options['model']}: {source}{_one_line(error)}") from None
    vocabulary = tokenizer.get_vocab()
    if options["top_k"] >= len(vocabulary):
        raise ArgumentError(f"--top-k: {options['top_k']}, expected less than {len(vocabulary)}, the model's tokens")
    for token in options.get("extra_eos_token", ()):
        if token not in vocabulary and not (token.isdecimal() and int(token) in vocabulary.values()):
            raise ArgumentError(f"--extra-eos-token: {token!r}, expected a token of the model, or its number")
        tokenizer.add_eos_token(token)
    return model, tokenizer


def _one_line(error: Exception) -> str:
    """What an error says, and its type where that alone would be a riddle."""
    told = (str(error).splitlines() or [""])[0]
    return (
        told if told and isinstance(error, OSError | RuntimeError | ValueError) else f"{type(error).__name__}: {told}"
    )


class Session:
    """A model on a ring, and the cache of what was said.

    Attributes:
        options: The command's.
        text: What the command has read on rank 0.
    """

    def __init__(self, ring: Ring, model: Any, tokenizer: Any, options: dict[str, Any], text: Any = None):
        import mlx.core as mx

        from .. import lm

        self.ring, self.model, self.tokenizer, self.options, self.text = ring, model, tokenizer, options, text
        weights, file = options["weights"], options.get("prompt_cache_file")
        lm.shard(model, ring, weights=None if weights is None else _numbers(weights))
        if options["seed"] is not None:
            mx.random.seed(options["seed"])
        if file is None:
            self.forget()
            return
        self.cache, _ = lm.load_cache(file, model)

    @property
    def speaks(self) -> bool:
        """Whether this rank reads and writes for all."""
        return self.ring.rank == 0

    def forget(self) -> None:
        """Begin again."""
        self.cache = self.model.make_cache()

    def tokens(self, text: str, plain: bool = False) -> list[int]:
        """A user's turn, in the model's chat template unless it is to be `plain`; of rank 0, on others nothing."""
        from ..transport.consensus import heard

        if not self.speaks:
            return []
        with heard(self.ring, "broadcast"):
            if plain or not self.tokenizer.has_chat_template:
                self._check_plain()
                return list(self.tokenizer.encode(text))
            try:
                return self._turn(text)
            except Exception as error:  # whatever a model's template says, such as that it knows no system prompt
                raise ArgumentError(f"the model's chat template: {_one_line(error)}") from None

    def _check_plain(self) -> None:
        for name in ("system_prompt", "chat_template_config"):
            if self.options[name] is not None:
                flag = "--" + name.replace("_", "-")
                raise ArgumentError(f"{flag}: {self.options[name]!r}, expected none: no chat template is used")

    def _turn(self, text: str) -> list[int]:
        """A user's turn in the template. What that puts before it, the system prompt too, is the first turn's alone."""
        system, config = self.options["system_prompt"], self.options["chat_template_config"] or {}
        template = partial(self.tokenizer.apply_chat_template, tokenize=False, **config)
        before, turn = [{"role": "system", "content": system or ""}], [{"role": "user", "content": text}]
        if not self.cache[0].size():
            whole = template([*before, *turn] if system is not None else turn, add_generation_prompt=True)
        else:
            whole = template(turn, add_generation_prompt=True)
            with suppress(Exception):  # a template that knows no system prompt, or wants a user
                both, first = template([*before, *turn], add_generation_prompt=True), template(before)
                whole = both.removeprefix(first) if both.startswith(first) else whole
        return list(self.tokenizer.encode(whole, add_special_tokens=False))

    def answer(self, ids: Sequence[int], stopped: Callable[[], bool] | None = None) -> Any:
        """Generate, and print what comes on rank 0; mlx-lm's last response, ``None`` if there was none.

        `stopped` is `ringattn.lm.stream_generate`'s. A prompt that is not read to its end leaves nothing, unless
        windows have dropped tokens for it.
        """
        from mlx_lm.sample_utils import make_sampler

        from .. import lm

        options, response, before = self.options, None, self.cache[0].size()
        for response in lm.stream_generate(
            self.model,
            self.tokenizer,
            ids,
            max_tokens=options["max_tokens"],
            sampler=make_sampler(options["temp"], options["top_p"], options["min_p"], top_k=options["top_k"]),
            chunk=options["prefill_step_size"],
            prompt_cache=self.cache,
            prompt_progress_callback=bar() if self.speaks else None,
            stopped=stopped,
        ):
            if self.speaks:
                click.echo(response.text, nl=False)
        if self.speaks:
            click.echo()
        if response is None and all(c.is_trimmable() for c in self.cache):
            for c in self.cache:
                c.trim(c.size() - before)
        return response

    def save(self) -> None:
        """Write the cache where that is asked for."""
        from .. import lm

        path, metadata = self.options["save_prompt_cache"], {"model": self.options["model"]}
        if path is None:
            return
        try:
            lm.save_cache(path, self.cache, metadata, model=self.model)
        except OSError as error:  # on other ranks it is an ArgumentError
            raise ArgumentError(f"--save-prompt-cache: {error}") from None


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ArgumentError(f"--weights: {text!r}, expected numbers with commas between them") from None
