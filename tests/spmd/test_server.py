"""The server's engine on every rank: after a request that fails, the ranks still answer the next one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from ringattn import Ring

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from pathlib import Path

import families
import mlx_lm
from tiny_model import make_folder

from ringattn import lm
from ringattn.lm.server import Engine, engine
from ringattn.lm.server.api.requests import Request, Served, read_request
from ringattn.lm.sharding.recurrent_cache import TAIL

pytestmark = pytest.mark.two_ranks

PLAIN = {"prompt": "Once upon a time", "max_tokens": 9}


def request(found: Engine, **body: Any) -> Request:
    return read_request("text", {**PLAIN, **body}, Served(("tiny",), found.vocabulary, {"max_tokens": 9}))


def ask(found: Engine, **body: Any) -> list[int] | Exception:
    """The tokens of an answer, or the error."""
    asked = request(found, **body)
    answer = found.submit(asked, found.tokenizer.encode(asked.prompt))
    try:
        return [piece.token for piece in found.pieces(answer, lambda: None, lambda *_: None)]
    except Exception as error:
        return error
    finally:
        found.leave(answer)


def serve(
    ring: Ring, loaded: tuple[Any, Any], client: Callable[[Engine], None], log: Callable[[str], object] = print
) -> None:
    """Run the engine of a model and its tokenizer on all ranks while `client` sends requests on rank 0."""
    model, tokenizer = loaded
    lm.shard(model, ring)
    found = Engine(model, tokenizer, 2, 64, log)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            client(found)
        except BaseException as error:
            failed.append(error)
        finally:
            found.stopping = True

    if ring.rank == 0:
        threading.Thread(target=work, daemon=True).start()
    found.run()
    if failed:
        raise failed[0]


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Any, Any]:
    """A tiny Llama and its tokenizer."""
    return lm.load(make_folder(tmp_path), mx.float32)


@pytest.mark.parametrize("family", ["llama", "qwen3_5", "falcon_h1"])
def test_tokens_that_are_reused(ring: Ring, family: str) -> None:
    """Each answer is the one to the whole prompt, whatever of it was read before; the log says what is read again."""
    plain = families.build(family)
    log: list[str] = []

    def answered(found: Engine, ids: list[int]) -> tuple[int, list[int]]:
        answer = found.submit(request(found), ids)
        tokens = [piece.token for piece in found.pieces(answer, lambda: None, lambda *_: None)]
        found.leave(answer)
        expected = mlx_lm.stream_generate(plain, families.words(), ids, max_tokens=9)
        assert tokens == [response.token for response in expected]
        return answer.cached, tokens

    def client(found: Engine) -> None:
        first, other = [i % 50 for i in range(100)], [3] * 100
        cached, tokens = answered(found, first)
        assert cached == 0
        assert answered(found, [*first, *tokens, 5])[0] == 109  # the next turn
        assert answered(found, [*first, *tokens, 5])[0] == 109  # again: its last token is read
        assert answered(found, other)[0] == 0  # a new conversation
        assert not log
        assert answered(found, other)[0] == (99 if family == "llama" else 100 - TAIL)  # again
        turn = [*other[:98], 7, 8, 9]
        assert answered(found, turn)[0] == (98 if family == "llama" else 100 - TAIL)  # its end was another one
        again = "of these again: no state of the recurrent layers is kept there."
        assert (
            log
            == [
                f"Prompt of 100 tokens: 68 are reused and 32 read, 31 {again}",
                f"Prompt of 101 tokens: 68 are reused and 33 read, 30 {again}",
            ][: 0 if family == "llama" else 2]
        )

    serve(ring, (families.build(family), families.words()), client, log.append)
    assert ring.rank == 0 or not log


def test_failures_on_rank_0_alone(ring: Ring, tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures come before a request goes to the other ranks, and during its answer up to the last token."""
    likeliest = engine._likeliest
    make_sampler = engine.make_sampler

    def fail(at: int) -> Callable[..., Any]:
        calls = iter(range(at + 1))
        return lambda *a: likeliest(*a) if next(calls) < at else 1 / 0

    def client(found: Engine) -> None:
        expected = ask(found)
        assert isinstance(expected, list) and len(expected) == 9
        for at in (0, 4, 8):
            monkeypatch.setattr(engine, "_likeliest", fail(at))
            assert isinstance(ask(found, logprobs=2), ZeroDivisionError)
            assert ask(found) == expected
        monkeypatch.setattr(engine, "make_sampler", lambda *_, **__: 1 / 0)
        assert isinstance(ask(found), ZeroDivisionError)
        monkeypatch.setattr(engine, "make_sampler", lambda *_, **__: lambda logprobs: 1 / 0)
        assert isinstance(ask(found), Exception)  # inside a collective call, which raises it on all ranks
        monkeypatch.setattr(engine, "make_sampler", make_sampler)
        assert ask(found) == expected

    serve(ring, tiny, client)


def test_logprobs_are_the_models(ring: Ring, tiny: tuple[Any, Any]) -> None:
    """The likeliest token comes first, and greedy sampling chose it."""

    def client(found: Engine) -> None:
        asked = request(found, logprobs=3)
        answer = found.submit(asked, found.tokenizer.encode(asked.prompt))
        pieces = list(found.pieces(answer, lambda: None, lambda *_: None))
        found.leave(answer)
        assert len(pieces) == 9 and pieces[-1].finish_reason == "length"
        for piece in pieces:
            assert piece.top[0] == (piece.token, piece.logprob) and len(piece.top) == 3
            assert [one[1] for one in piece.top] == sorted((one[1] for one in piece.top), reverse=True)

    serve(ring, tiny, client)


def test_too_many_requests_and_those_that_left(
    ring: Ring, tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MOST_WAITING", 3)

    def client(found: Engine) -> None:
        expected = ask(found)
        ids = found.tokenizer.encode("x" * 200)
        waiting = [found.submit(request(found, max_tokens=500), ids) for _ in range(3)]
        with pytest.raises(Exception, match="3 requests wait for their turn"):
            ask(found)
        for answer in waiting:
            found.leave(answer)
        assert ask(found) == expected

    serve(ring, tiny, client)
