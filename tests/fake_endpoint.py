"""A real HTTP server that speaks the chat-completions protocol, and misbehaves as it is told."""

import base64
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from PIL import Image

from gdro.rewards.judges import endpoint
from gdro.rewards.judges.endpoint import Endpoint, Question


@dataclass
class Asked:
    """A request, as it came."""

    number: int  # of the requests for a completion, from 0
    body: dict[str, Any]
    headers: dict[str, str]
    time: float

    @property
    def content(self) -> list[dict[str, Any]]:
        return self.body["messages"][0]["content"]

    @property
    def text(self) -> str:
        return next(part["text"] for part in self.content if part["type"] == "text")

    @property
    def images(self) -> list[Image.Image]:
        uris = [part["image_url"]["url"] for part in self.content if part["type"] == "image_url"]
        return [Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))) for uri in uris]


@dataclass
class Said:
    """A response: `content` in a completion, or with `raw` those bytes; after `delay` seconds; or a reset instead."""

    content: str | None = "fine"
    status: int = 200
    finish_reason: str = "stop"
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    delay: float = 0.0
    reset: bool = False


class FakeEndpoint:
    """`with FakeEndpoint(behave) as server: ... server.url`; `behave` gets an `Asked` and returns a `Said`.

    `models` None is a server without a list of models.
    """

    def __init__(self, behave: Callable[[Asked], Said], models: tuple[str, ...] | None = ("judge",)) -> None:
        self.behave, self.models = behave, models
        self.asked: list[Asked] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.endpoint = self
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    endpoint: FakeEndpoint

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # without an orderly end first, so that a reset is one

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed or stop waiting are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Server

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        models = self.server.endpoint.models
        if self.path != "/v1/models" or models is None:
            return self._send(404, b'{"detail": "Not Found"}')
        listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in models]}
        self._send(200, json.dumps(listed).encode())

    def do_POST(self) -> None:
        endpoint = self.server.endpoint
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/chat/completions":
            return self._send(404, b'{"detail": "Not Found"}')
        with endpoint.lock:
            asked = Asked(len(endpoint.asked), json.loads(raw), dict(self.headers), time.monotonic())
            endpoint.asked.append(asked)
            endpoint.in_flight += 1
            endpoint.most_in_flight = max(endpoint.most_in_flight, endpoint.in_flight)
        try:
            said = endpoint.behave(asked)
            time.sleep(said.delay)
        finally:
            with endpoint.lock:
                endpoint.in_flight -= 1
        if said.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        message = {"role": "assistant", "content": said.content}
        choice = {"index": 0, "message": message, "finish_reason": said.finish_reason}
        completion = {"id": "1", "object": "chat.completion", "model": asked.body["model"], "choices": [choice]}
        self._send(said.status, json.dumps(completion).encode() if said.raw is None else said.raw, said.headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[FakeEndpoint, Endpoint]]]:
    """`serve(behave, **settings)`: a running server and a client of it, with short pauses and a cache of its own."""
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)
    with ExitStack() as servers:

        def start(
            behave: Callable[[Asked], Said], models: tuple[str, ...] | None = ("judge",), **settings: Any
        ) -> tuple[FakeEndpoint, Endpoint]:
            server = servers.enter_context(FakeEndpoint(behave, models))
            settings = {"url": server.url, "model": "judge", "cache": str(folder / "judge.sqlite")} | settings
            return server, Endpoint(**settings)

        yield start


def number(text: str) -> float | None:
    """The parser of these tests: a reply is good if it is a number."""
    try:
        return float(text)
    except ValueError:
        return None


def questions(count: int) -> list[Question]:
    return [Question(f"What is {i}?") for i in range(count)]


def echo(asked: Asked) -> Said:
    return Said(asked.text.removeprefix("What is ").rstrip("?"))
