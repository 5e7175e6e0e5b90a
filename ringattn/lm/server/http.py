"""The HTTP interface: routes, bodies, errors and streams."""

from __future__ import annotations

import io
import json
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from .api.answers import AnswerParser, Delta
from .api.fields import RequestError
from .api.requests import read_json, read_request
from .api.responses import Responses, error_object, usage_object
from .engine import Answer, AnswerPiece, Engine
from .listener import DeadlineReader, Server
from .service import Service, Settings

READING = ("GET", "HEAD")  # HEAD is GET without a body (RFC 9110, 9.3.2)
CLIENT_TIMEOUT = 60.0  # s for a client to send its request, and to take each part of its answer


class Handler(BaseHTTPRequestHandler):
    """A handler of one HTTP request."""

    timeout = CLIENT_TIMEOUT

    def __init__(self, service: Service, *args: Any):
        self._service = service
        self._begun = False  # whether the answer has begun
        self._allowed: tuple[str, ...] = ()  # methods of the address, where the request has another
        super().__init__(*args)

    def setup(self) -> None:
        """Read from the connection with one deadline for the whole request."""
        super().setup()
        self.rfile.close()
        deadline = time.monotonic() + CLIENT_TIMEOUT
        self.rfile = io.BufferedReader(DeadlineReader(self.connection, deadline))

    # Routes

    def do_GET(self) -> None:  # noqa: N802  (http.server names it)
        self._respond("GET")

    def do_POST(self) -> None:  # noqa: N802
        self._respond("POST")

    def do_OPTIONS(self) -> None:  # noqa: N802
        self._head(204)

    def _other(self) -> None:
        self._respond(self.command)

    do_HEAD = do_PUT = do_PATCH = do_DELETE = _other  # noqa: N815

    def _respond(self, method: str) -> None:
        """Send an answer or an error."""
        try:
            self._route(method)()
        except RequestError as refused:
            self._refuse(refused)
        except (ConnectionError, TimeoutError) as error:
            self.log_message("the client has left: %s", error or type(error).__name__)
        except Exception as error:  # the answer failed halfway
            self._refuse(RequestError(500, f"{type(error).__name__}: {error}", code="internal_error"))
        self.close_connection = True

    def _route(self, method: str) -> Callable[[], None]:
        path = self.path.partition("?")[0]
        routes: dict[str, dict[str, Callable[[], None]]] = {
            "/v1/chat/completions": {"POST": partial(self._complete, "chat")},
            "/chat/completions": {"POST": partial(self._complete, "chat")},
            "/v1/completions": {"POST": partial(self._complete, "text")},
            "/health": dict.fromkeys(READING, self._health),
        }
        if path == "/v1/models" or path.startswith("/v1/models/"):
            routes[path] = dict.fromkeys(READING, self._models)
        if path not in routes:
            raise RequestError(404, f"{path[:200]}: no such address here", code="not_found")
        if method not in routes[path]:
            self._allowed = (*routes[path], "OPTIONS")
            expected = " or ".join(routes[path])
            raise RequestError(405, f"{path}: {method}, expected {expected}", code="method_not_allowed")
        return routes[path][method]

    def _health(self) -> None:
        if self._service.engine.stopping:
            raise RequestError(503, "the server is shutting down", code="shutting_down")
        self._send(200, {"status": "ok"})

    def _models(self) -> None:
        """Describe the one model of this server."""
        names = self._service.served.names
        wanted = self.path.partition("?")[0].removeprefix("/v1/models").strip("/")
        if wanted and wanted not in names:
            message = f"model: {wanted[:200]!r} is not served here, expected {names[0]!r}"
            raise RequestError(404, message, "model", "model_not_found")
        model = {"id": names[0], "object": "model", "created": self._service.created, "owned_by": "ringattn"}
        self._send(200, model if wanted else {"object": "list", "data": [model]})

    # Completions

    def _complete(self, kind: str) -> None:
        """Read and check a request, generate its answer, and send it."""
        service = self._service
        body = self._body()
        with service.reading:
            request = read_request(kind, read_json(body), service.served)
        del body
        prompt = service.prompts.build(request)
        self.connection.settimeout(CLIENT_TIMEOUT)
        answer = service.engine.submit(request, prompt.ids)
        try:
            send = self._stream if request.stream else self._whole
            send(answer, service.parser(request, prompt.state), service.responses(request))
        finally:
            service.engine.leave(answer)

    def _body(self) -> bytes:
        """Read the body of a request; its length is checked first."""
        length = self.headers.get("Content-Length", "")
        if not length:
            raise RequestError(411, "Content-Length: not given, expected the length of the body in bytes")
        if not (length.isascii() and length.isdigit()):
            raise RequestError(400, f"Content-Length: {length[:60]}, expected a number of bytes")
        most = self._service.settings.max_body
        if len(length) > 18 or int(length) > most:
            message = f"request body: {length[:60]} bytes, expected at most {most}; the server's --max-body raises it"
            raise RequestError(413, message, code="request_too_large")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            message = f"request body: not complete after {CLIENT_TIMEOUT:g} s"
            raise RequestError(408, message, code="request_timeout") from None
        if len(body) < int(length):
            raise ConnectionResetError("the client closed the connection before its request was complete")
        return body

    def _whole(self, answer: Answer, parser: AnswerParser, responses: Responses) -> None:
        """Send an answer in one response, when it is complete."""
        total = Delta()
        pieces = []
        finish: str | None = None
        for piece in self._pieces(answer):
            delta, finish = parser.push(piece.text, piece.finish_reason)
            total.content += delta.content
            total.reasoning += delta.reasoning
            total.tool_calls += delta.tool_calls
            pieces.append(piece)
        shown = [piece for piece in pieces if piece.logprob is not None]
        usage = usage_object(len(answer.ids), len(pieces), answer.cached)
        self._send(200, responses.whole(total, finish or "stop", shown, usage))

    def _stream(self, answer: Answer, parser: AnswerParser, responses: Responses) -> None:
        """Send an answer in chunks as it is generated."""
        self._head(200, "text/event-stream", {"Cache-Control": "no-cache"})
        count = 0
        waiting: list[AnswerPiece] = []  # pieces whose text is held back
        for piece in self._pieces(answer):
            count += 1
            waiting += [piece] if piece.logprob is not None else []
            delta, finish = parser.push(piece.text, piece.finish_reason)
            if delta or finish is not None:
                self._event(responses.chunk(delta, finish, waiting))
                waiting = []
        if answer.request.include_usage:
            self._event(responses.usage_chunk(usage_object(len(answer.ids), count, answer.cached)))
        self.wfile.write(b"data: [DONE]\n\n")

    def _pieces(self, answer: Answer) -> Iterator[AnswerPiece]:
        return self._service.engine.pieces(answer, self._check_client, self._progress)

    def _progress(self, done: int, total: int) -> None:
        """Send a comment during prefill, so that the stream's connection stays open."""
        if self._begun:
            self.wfile.write(f": keepalive {done}/{total}\n\n".encode())

    def _check_client(self) -> None:
        """Raise ConnectionError if the client has closed the connection."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError("the client closed the connection")

    # Responses

    def _event(self, chunk: dict[str, Any]) -> None:
        """Send one chunk of a stream."""
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def _refuse(self, error: RequestError) -> None:
        """Send an error, in the stream if one has begun."""
        try:
            self.connection.settimeout(CLIENT_TIMEOUT)
            if self._begun:
                self._event(error_object(error))
            else:
                self._send(error.status, error_object(error))
        except OSError:
            pass  # the client has left

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a request that `http.server` cannot read as HTTP."""
        self.close_connection = True
        self._refuse(RequestError(int(code), message or HTTPStatus(code).phrase, code="bad_request"))

    def _send(self, status: int, content: dict[str, Any]) -> None:
        """Send a JSON object."""
        body = json.dumps(content).encode()
        self._head(status, headers={"Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, kind: str = "application/json", headers: Mapping[str, str] | None = None) -> None:
        """Send the status line and the headers."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self._allowed:
            self.send_header("Allow", ", ".join(self._allowed))
        self._allow_origin()
        self._begun = True
        self.end_headers()

    def _allow_origin(self) -> None:
        """Send the headers that let scripts of allowed web pages read the answer."""
        allowed = self._service.settings.origins
        origin = self.headers.get("Origin") if hasattr(self, "headers") else None
        if "*" in allowed:
            self.send_header("Access-Control-Allow-Origin", "*")
        elif origin in allowed:
            self.send_header("Access-Control-Allow-Origin", str(origin))
            self.send_header("Vary", "Origin")
        self.send_header("Access-Control-Allow-Methods", "*")
        self.send_header("Access-Control-Allow-Headers", "*")


def open_server(engine: Engine, settings: Settings, host: str, port: int) -> Server:
    """Open a server that listens on `host` and `port` (0: any free one); a thread then calls its `serve_forever`.

    Raises:
        OSError: The address cannot be used.
    """
    family, address = _resolve(host, port)
    kind = type("Server", (Server,), {"address_family": family})
    server: Server = kind(address, partial(Handler, Service(engine, settings)))
    return server


def check_address(host: str, port: int) -> None:
    """Check that a server could listen on `host` and `port` now, before a model is loaded for it.

    Raises:
        OSError: The address cannot be used.
    """
    family, address = _resolve(host, port)
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server
        probe.bind(address)


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, address
