"""Answers on all ranks: requests wait in rank 0's queue, and every rank works on one of them at a time."""

from __future__ import annotations

import json
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any

import mlx.core as mx
from mlx_lm import server as mlx_server
from mlx_lm.generate import make_text_state_machine

from ...errors import RingError
from ...transport.collectives import broadcast_bytes
from ...transport.consensus import heard
from ..generate import stream_generate
from ..shard import Sharded
from .cache_pool import KeptCaches
from .stop_words import StopWords

LOOK = 0.25  # s between two looks whether a client, or the server, is still there


@dataclass
class Answer:
    """A request that waits for its turn or has it; rank 0 alone knows of it.

    Attributes:
        ids: The prompt.
        args: mlx-lm's arguments of the generation.
        context: What mlx-lm's handler wants to know of the answer; it says when its client has left.
        replies: mlx-lm's responses, progress as ``(done, total)``, an exception, or ``None`` at the end.
    """

    ids: list[int]
    args: Any
    context: Any
    replies: Queue = field(default_factory=Queue)

    @property
    def left(self) -> bool:
        return bool(self.context._should_stop)


class Engine(mlx_server.ResponseGenerator):
    """What mlx-lm's HTTP handler asks for answers.

    Args:
        model: Sharded.
        tokenizer: Its tokenizer.
        cli_args: mlx_lm.server's command-line arguments, as far as its handler reads them.
        kept: How many caches of earlier requests are kept.
        chunk: As in `stream_generate`.
    """

    def __init__(self, model: Sharded, tokenizer: Any, cli_args: Namespace, kept: int, chunk: int | None = None):
        # Not mlx-lm's own, which asks mx.distributed for a group: that would start MPI a second time in this process.
        self.model, self.tokenizer, self.ring = model, tokenizer, model.ring
        self.model_provider: Any = Namespace(processor=None, cli_args=cli_args)
        self.stopping = False
        self._kept, self._chunk = KeptCaches(kept), chunk
        self._queue: Queue[Answer] = Queue()
        self._tokenizing = threading.Lock()  # a fast tokenizer serves one thread at a time

    # What the threads of HTTP requests call, on rank 0

    def generation_available(self) -> bool:
        return not self.stopping

    def tokens(self, request: Any, template: Any) -> tuple[list[int], str]:
        """The ids of a request's prompt, and the state that the answer begins in, of mlx-lm's state machine."""
        with self._tokenizing:
            found = self._tokenize(self.tokenizer, request, Namespace(chat_template_kwargs=template))
        return list(found[0]), found[3]

    def generate(
        self, request: Any, generation_args: Any, progress_callback: Callable[[int, int], None] | None = None
    ) -> tuple[Any, Iterator[Any]]:
        """Queue a request (an `http.Prompt`): its context, and the responses as they come.

        Leaving the iterator early, or a client that is gone, frees the place for the next one.
        """
        context = mlx_server.GenerationContext(
            has_tool_calling=self.tokenizer.has_tool_calling,
            has_thinking=self.tokenizer.has_thinking,
            tool_parser=self.tokenizer.tool_parser,
            text_sm=make_text_state_machine(self.tokenizer, generation_args.stop_words),
            initial_state=request.initial_state,
            prompt=request.ids,
        )
        answer = Answer(request.ids, generation_args, context)
        self._queue.put(answer)
        return context, self._responses(answer, request.check_client, progress_callback or (lambda *_: None))

    def _responses(
        self, answer: Answer, check_client: Callable[[], None], progress: Callable[[int, int], None]
    ) -> Iterator[Any]:
        looked = time.monotonic()
        while True:
            if time.monotonic() - looked > LOOK:
                check_client()
                looked = time.monotonic()
            try:
                reply = answer.replies.get(timeout=LOOK)
            except Empty:
                if self.stopping:
                    raise RuntimeError("the server is shutting down") from None
                continue
            if reply is None:
                return
            if isinstance(reply, Exception):
                raise reply
            if isinstance(reply, tuple):
                progress(*reply)
            else:
                yield reply

    # What the main thread of every rank does

    def run(self) -> None:
        """Answer requests until rank 0's `stopping` is set. Collective."""
        while (answer := self._next()) is not None or self.ring.rank:
            told = broadcast_bytes(self.ring, None if self.ring.rank else _job(answer))
            if not told:
                return
            self._serve(answer, **json.loads(told))
        broadcast_bytes(self.ring, b"")

    def _next(self) -> Answer | None:
        """The next request whose client is still there; ``None`` at the end, and on other ranks than 0."""
        while not self.stopping and self.ring.rank == 0:
            try:
                answer = self._queue.get(timeout=LOOK)
            except Empty:
                continue
            if not answer.left:
                return answer
        return None

    def _serve(self, answer: Answer | None, ids: list[int], max_tokens: int, stop: list[str]) -> None:
        """Answer one request. What goes wrong with it alone is told to its client, and the next one has its turn."""
        replies = answer.replies if answer else None
        try:
            self._answer(answer, ids, max_tokens, StopWords(stop))
        except Exception as error:  # on every rank: a collective call tells all of them
            if replies is not None:
                replies.put(error)
            if isinstance(error, RingError):
                raise
        else:
            if replies is not None:
                replies.put(None)

    def _answer(self, answer: Answer | None, ids: list[int], max_tokens: int, stop: StopWords) -> None:
        cache, known = self._kept.take(ids)
        cache = self.model.make_cache() if cache is None else cache
        held = list(ids)
        for response in stream_generate(
            self.model,  # type: ignore[arg-type]
            self.tokenizer,
            ids[known:],
            max_tokens=max_tokens,
            chunk=self._chunk,
            prompt_cache=cache,
            **({} if answer is None else self._options(answer, known)),
        ):
            held.append(response.token)
            cut = stop.cut(response.text)
            if answer is not None:
                answer.replies.put(self._response(answer, response, cut))
            if cut is not None:
                break
        self._kept.give(held[: cache[0].size()], cache)

    def _options(self, answer: Answer, known: int) -> dict[str, Any]:
        """What rank 0 decides: the sampling, and the end where the client has left."""
        answer.context.prompt_cache_count = known
        with heard(self.ring, "broadcast"):
            if answer.args.seed is not None:
                mx.random.seed(answer.args.seed)
            with self._tokenizing:
                sampler = mlx_server._make_sampler(answer.args, self.tokenizer)
            processors = mlx_server._make_logits_processors(answer.args)
        return {
            "sampler": sampler,
            "logits_processors": processors,
            "stopped": lambda: self.stopping or answer.left,
            "prompt_progress_callback": lambda done, total: answer.replies.put((done, total)),
        }

    def _response(self, answer: Answer, response: Any, cut: str | None) -> Any:
        """mlx-lm's response. After a stop word the end follows without one, which its handler takes for a stop."""
        top = mlx_server._format_top_logprobs(response.logprobs, answer.args.top_logprobs, self.tokenizer)
        logprob = response.logprobs[response.token].item()
        if cut is not None:
            return mlx_server.Response(cut, response.token, logprob, None, top)
        return mlx_server.Response(response.text, response.token, logprob, response.finish_reason, top)


def _job(answer: Answer | None) -> bytes:
    """What every rank has to know of a request."""
    assert answer is not None
    args = answer.args
    return json.dumps({"ids": answer.ids, "max_tokens": args.max_tokens, "stop": _words(args.stop_words)}).encode()


def _words(stop_words: Sequence[str]) -> list[str]:
    return [word for word in stop_words if word]
