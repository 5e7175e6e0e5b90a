"""mlx-lm's HTTP handler, which says no in one line to what it cannot do and notices when a client leaves."""

from __future__ import annotations

import io
import json
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from math import isfinite
from pathlib import Path
from typing import Any

from mlx_lm import server as mlx_server

from .engine import Engine

LARGEST = 64 << 20  # bytes of a request
PATIENCE = 60.0  # s that a client may neither send what it announced nor take what it is sent
REALS = ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty")
WHOLES = ("seed", "max_tokens", "repetition_context_size", "presence_context_size", "frequency_context_size")
LARGEST_REAL, LARGEST_WHOLE, LARGEST_SEED = 1e6, 2**31 - 1, 2**64 - 1
DEFAULT = "default_model"  # mlx-lm's name for the model of the command line


class RefusedError(Exception):
    """A request that is not answered: the HTTP status, and why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


@dataclass
class Prompt(mlx_server.CompletionRequest):
    """mlx-lm's request, tokenized.

    Attributes:
        ids: The tokens.
        initial_state: The state of mlx-lm's state machine that the answer begins in.
        check_client: Raises ConnectionError if the client has left.
    """

    ids: list[int]
    initial_state: str
    check_client: Callable[[], None]


class Handler(mlx_server.APIHandler):
    """One HTTP request."""

    response_generator: Engine
    timeout = PATIENCE

    def do_POST(self) -> None:  # noqa: N802  (http.server names it)
        try:
            self.rfile = io.BytesIO(self._read())
            super().do_POST()
        except RefusedError as refused:
            self._refuse(refused.status, str(refused))
        except RecursionError:
            self._refuse(400, "request body: nested too deep, expected JSON of a few levels")
        except (ConnectionError, TimeoutError) as error:
            self.log_message("the client has left: %s", error or type(error).__name__)
        except Exception as error:  # an answer that broke off
            self._refuse(500 if self.response_generator.generation_available() else 503, str(error))
        self.close_connection = True

    def _read(self) -> bytes:
        """The body; mlx-lm's own handler answers where its length is not a number."""
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
                raise RefusedError(411, "Content-Length: not given, expected the length of the body in bytes")
            if length.startswith("-"):
                raise RefusedError(400, f"Content-Length: {length}, expected a number of bytes")
            return b""
        if int(length) > LARGEST:
            raise RefusedError(413, f"Content-Length: {length}, expected at most {LARGEST} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionResetError("its request is not complete")
        _check_json(body)
        return body

    def handle_completion(self, request: Any, stop_words: Any) -> None:
        """Look at what mlx-lm's handler does not look at, tokenize, and let it go on."""
        self._check(request, stop_words)
        engine = self.response_generator
        if not engine.generation_available():
            raise RefusedError(503, "the server is shutting down")
        try:
            ids, state = engine.tokens(request, self.chat_template_kwargs)
        except Exception as error:  # whatever a model's template says to these messages
            raise RefusedError(400, f"the prompt cannot be made: {type(error).__name__}: {error}") from None
        if not ids:
            raise RefusedError(400, "prompt: no token, expected at least one")
        prompt = Prompt(**vars(request), ids=ids, initial_state=state, check_client=self.check)
        super().handle_completion(prompt, stop_words)

    def handle_chat_completions(self) -> Any:
        """Refuse what mlx-lm's handler stumbles over, and images, which it would fetch from wherever they are."""
        _check_messages(self.body.get("messages"))
        return super().handle_chat_completions()

    def check(self) -> None:
        """Raise ConnectionError if the client has closed its side."""
        if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError("it closed the connection")

    def _check(self, request: Any, stop_words: Any) -> None:
        body, names = self.body, self._names()
        if self.requested_model not in names:
            raise RefusedError(404, f"model: {self.requested_model!r} is not served here, expected {names[0]!r}")
        if self.adapter is not None:
            raise RefusedError(400, f"adapters: {self.adapter!r}, expected none: the model is that of the command line")
        if self.requested_draft_model != DEFAULT:
            raise RefusedError(
                400, f"draft_model: {self.requested_draft_model!r}, expected none: nothing is drafted here"
            )
        if body.get("n", 1) != 1:
            raise RefusedError(400, f"n: {body['n']!r}, expected 1: a request has one answer")
        if not isinstance(stop_words, list) or not all(isinstance(word, str) and word for word in stop_words):
            raise RefusedError(400, f"stop: {stop_words!r}, expected a text or a list of texts that are not empty")
        if not isinstance(self.chat_template_kwargs or {}, dict):
            raise RefusedError(400, f"chat_template_kwargs: {self.chat_template_kwargs!r}, expected an object")
        options = self.stream_options
        if options is not None and not (isinstance(options, dict) and "include_usage" in options):
            raise RefusedError(400, f"stream_options: {options!r}, expected an object with include_usage")
        self._check_numbers()
        vocabulary = len(self.response_generator.tokenizer.get_vocab())
        if self.top_k >= vocabulary:
            raise RefusedError(400, f"top_k: {self.top_k}, expected less than {vocabulary}")
        if wrong := [token for token in self.logit_bias or () if not 0 <= token < vocabulary]:
            raise RefusedError(400, f"logit_bias: token {wrong[0]}, expected 0 to {vocabulary - 1}")
        if request.request_type == "text" and not isinstance(request.prompt, str):
            raise RefusedError(400, f"prompt: of type {type(request.prompt).__name__}, expected a text")

    def _check_numbers(self) -> None:
        """What is a number for mlx-lm's handler, but not for the sampling."""
        for name in REALS:
            if not abs(getattr(self, name)) <= LARGEST_REAL:
                raise RefusedError(400, f"{name}: {getattr(self, name)}, expected at most {LARGEST_REAL:g}")
        for token, bias in (self.logit_bias or {}).items():
            if not abs(bias) <= LARGEST_REAL:
                raise RefusedError(400, f"logit_bias: {bias} for token {token}, expected at most {LARGEST_REAL:g}")
        whole = {name: getattr(self, name) for name in WHOLES if getattr(self, name) is not None}
        for name, value in whole.items():
            most = LARGEST_SEED if name == "seed" else LARGEST_WHOLE
            if isinstance(value, bool) or not 0 <= value <= most:
                raise RefusedError(400, f"{name}: {value}, expected a whole number from 0 to {most}")

    def handle_models_request(self) -> None:
        """The one model that is served here."""
        name = self._names()[0]
        wanted = self.path.partition("?")[0].removeprefix("/v1/models").strip("/")
        if wanted and wanted not in self._names():
            self._refuse(404, f"model: {wanted!r} is not served here, expected {name!r}")
            return
        model = {"id": name, "object": "model", "created": self.created}
        self._say(200, model if wanted else {"object": "list", "data": [model]})

    def _names(self) -> tuple[str, ...]:
        """What the model is called: first as on the command line."""
        name = str(self.response_generator.cli_args.model)
        return (name, Path(name).name, str(Path(name).resolve()), DEFAULT)

    def _refuse(self, status: int, reason: str) -> None:
        try:
            if self._begun:
                self.wfile.write(f"data: {json.dumps({'error': reason})}\n\n".encode())
            else:
                self._say(status, {"error": reason})
        except OSError:
            pass  # nobody is left to hear it

    def _say(self, status: int, what: dict) -> None:
        text = json.dumps(what).encode()
        self._headers_buffer: list[bytes] = []  # of an answer that was begun and is not given
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    _begun = False  # whether headers have been sent

    def flush_headers(self) -> None:
        super().flush_headers()
        self._begun = True


def _check_json(body: bytes) -> None:
    """Refuse what Python takes for JSON and should not; mlx-lm's own handler answers where it is none at all."""
    try:
        json.loads(body.decode(), parse_constant=_no_number, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise RefusedError(400, f"request body: not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError:
        pass
    except ValueError as error:  # an integer of thousands of digits
        raise RefusedError(400, f"request body: {error}") from None


def _no_number(text: str) -> None:
    raise RefusedError(400, f"request body: {text}, which is not JSON, expected finite numbers")


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise RefusedError(400, f"request body: {text[:32]}, expected finite numbers")
    return number


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise RefusedError(400, "messages: expected a list of objects, at least one")
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise RefusedError(400, f"messages[{i}].role: {message.get('role')!r}, expected a text such as 'user'")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if not (content is None or isinstance(content, str | list)):
            raise RefusedError(400, f"messages[{i}].content: {content!r}, expected a text or a list of parts")
        if not all(isinstance(part, dict) and part.get("type") == "text" and "text" in part for part in parts):
            raise RefusedError(400, f"messages[{i}].content: expected parts of type 'text'")


def open_server(engine: Engine, host: str, port: int) -> ThreadingHTTPServer:
    """A server that listens on `host` and `port` (0: any free one), to be served by a thread.

    Raises:
        OSError: It cannot listen there.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    kind = type("Server", (ThreadingHTTPServer,), {"address_family": family, "daemon_threads": True})
    fingerprint = mlx_server.get_system_fingerprint()
    server: ThreadingHTTPServer = kind(address, partial(Handler, engine, system_fingerprint=fingerprint))
    return server
