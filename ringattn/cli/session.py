"""What the commands that run a language model share: the ring, the model, and saying an answer."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ArgumentError, KernelWarning, MissingExtraError
from ..extras import require
from ..transport.environment import launched_by
from ..transport.interface import Transport
from . import leave
from .progress_bar import bar, shown
from .starting import Place, prepare

Work = Callable[["Session"], int | None]
Read = Callable[[dict[str, Any]], Any]
STARTED = "RINGATTN_STARTED"  # set for ranks that one of these commands has started itself

LONGEST_ERROR = 600  # characters of another library's message

if TYPE_CHECKING:
    from ..lm.conversation import Conversation


def run(work: Work, what: str, options: dict[str, Any], read: Read | None = None, forward_sigint: bool = False) -> None:
    """Do `work` on a ring: on ranks that are started, on those of a launcher, or in this process alone.

    Before the model is loaded, `read` gets the options on rank 0; what it gives is the session's `text`. With
    `forward_sigint`, the ranks that are started decide themselves what Ctrl-C means. `work` gives the exit code, where
    that is not 0.
    """
    place = Place.taken_from(options)
    if launched_by() == "solo" and place.elsewhere:
        leave(_on_ranks(place, forward_sigint))
    leave(_on_a_ring(work, what, place, options, read))


def _on_ranks(place: Place, forward_sigint: bool) -> int:
    """This command again, on ranks that find themselves under a launcher."""
    require("mlx_lm", "ringattn[lm]")  # before processes start
    own = replace(place, variables=(*place.variables, f"{STARTED}=1"))
    if place.hosts is None and place.hostfile is None:
        own = replace(own, ranks=place.ranks or 1)
    ranks = prepare(own, [sys.executable, "-m", "ringattn.cli", *sys.argv[1:]], prefix=False)
    return ranks.run(forward_sigint=forward_sigint, explained=True)


def _on_a_ring(work: Work, what: str, place: Place, options: dict[str, Any], read: Read | None) -> int:
    """Join the ring and do the work; the exit code. What is wrong on one rank is an error on all, told by rank 0."""
    from .. import init
    from ..ring.arguments import check_ring
    from ..transport.consensus import agree, raise_on_all_ranks

    with check_ring(init()) as ring:
        try:
            with raise_on_all_ranks(ring, what):
                _check_place(place, ring)
                _check_save(options.get("save_prompt_cache"))
                text = read(options) if read and ring.rank == 0 else None
            agree(ring, what, tuple((name, str(value)) for name, value in options.items()))
            if ring.rank == 0 and shown():
                click.echo(f"Loading {options['model']} ...", err=True)
            with _warnings_in_one_line(ring.rank == 0):
                with raise_on_all_ranks(ring, what):
                    model, tokenizer = _loaded(options)
                agree(ring, what)
                return work(Session(ring, model, tokenizer, options, text)) or 0
        except (ArgumentError, MissingExtraError) as error:
            if ring.rank == 0:
                click.echo(f"Error: {error}", err=True)
            return 1


def _check_place(place: Place, ring: Transport) -> None:
    """Refuse options of a place where a launcher has chosen it."""
    if place.given and STARTED not in os.environ and launched_by() != "solo":
        raise ArgumentError(f"{', '.join(place.given)}: given under a launcher, which has started {ring.size} ranks")


@contextmanager
def _warnings_in_one_line(speaks: bool) -> Iterator[None]:
    """Print warnings, once for all ranks and without a line of their source."""
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
    """The whole message of an error in one line, with its type where the message alone would not say enough."""
    message = " ".join(str(error).split())
    plain = message and isinstance(error, OSError | RuntimeError | ValueError)
    return (message if plain else f"{type(error).__name__}: {message}")[:LONGEST_ERROR]


class Session:
    """A model on a ring, and the cache of what was said.

    Attributes:
        options: The command's.
        text: What the command has read on rank 0.
    """

    def __init__(self, ring: Transport, model: Any, tokenizer: Any, options: dict[str, Any], text: Any = None):
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
        self.cache, metadata = lm.load_cache(file, model)
        self.talk = self._conversation(metadata, self.cache[0].tokens.reshape(-1).tolist())

    @property
    def speaks(self) -> bool:
        """Whether this rank reads and writes for all."""
        return self.ring.rank == 0

    def forget(self) -> None:
        """Begin again."""
        self.cache = self.model.make_cache()
        self.talk = self._conversation()

    def _conversation(self, *held: Any) -> Conversation:
        from ..lm.conversation import Conversation

        system, config = (self.options.get(name) for name in ("system_prompt", "chat_template_config"))  # not of serve
        return Conversation(self.tokenizer, system, config, *held)

    def tokens(self, text: str, plain: bool = False) -> list[int]:
        """What is to be read for a user's turn, in the model's chat template unless it is to be `plain`. Collective.

        The cache is trimmed to what it has in common with all that was said so far, and the rest is read again: a
        template may put an earlier turn otherwise once another one follows. Other ranks than 0 are given nothing.
        """
        from ..lm.conversation import reusable
        from ..transport.collectives import broadcast_bytes
        from ..transport.consensus import raise_on_all_ranks

        ids: list[int] = []
        known: bytes | None = None
        with raise_on_all_ranks(self.ring, "broadcast"):
            if self.speaks:
                ids = self._plain(text) if plain or not self.tokenizer.has_chat_template else self.talk.ask(text)
                known = str(reusable(self.cache, ids)).encode()
        kept = int(broadcast_bytes(self.ring, known))
        if kept == 0:
            self.cache = self.model.make_cache()
        for layer in self.cache:
            layer.trim(layer.size() - kept)
        return ids[kept:]

    def _plain(self, text: str) -> list[int]:
        """What the cache holds, and the text as it is after it."""
        for name in ("system_prompt", "chat_template_config"):
            if self.options[name] is not None:
                flag = "--" + name.replace("_", "-")
                raise ArgumentError(f"{flag}: {self.options[name]!r}, expected none: no chat template is used")
        return self.talk.ask_plainly(text, self.cache[0].tokens.reshape(-1).tolist())

    def answer(self, ids: Sequence[int], stopped: Callable[[], bool] | None = None) -> Any:
        """Generate, and print what comes on rank 0; mlx-lm's last response, ``None`` if there was none.

        `stopped` is `ringattn.lm.stream_generate`'s. A prompt that is not read to its end leaves nothing, unless
        windows have dropped tokens for it.
        """
        from mlx_lm.sample_utils import make_sampler

        from .. import lm

        options, response, before, said = self.options, None, self.cache[0].size(), ""
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
            said += response.text
            if self.speaks:
                click.echo(response.text, nl=False)
        if self.speaks:
            click.echo()
            self.talk.end_turn(None if response is None else said)
        if response is None and all(c.is_trimmable() for c in self.cache):
            for c in self.cache:
                c.trim(c.size() - before)
        return response

    def save(self) -> None:
        """Write the cache where that is asked for."""
        from .. import lm

        path = self.options["save_prompt_cache"]
        if path is None:
            return
        metadata = {"model": self.options["model"], **self.talk.metadata}
        try:
            lm.save_cache(path, self.cache, metadata, model=self.model)
        except OSError as error:  # on other ranks it is an ArgumentError
            raise ArgumentError(f"--save-prompt-cache: {error}") from None


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ArgumentError(f"--weights: {text!r}, expected numbers with commas between them") from None
