"""`gdro arena`: the page on loopback and the requests it makes."""

import ipaddress
import json
import secrets
import socket
import sqlite3
import sys
from collections.abc import Sequence
from contextlib import closing
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, StrictUndefined

from gdro.common.errors import UserError
from gdro.common.files import fingerprint
from gdro.common.reading import parse_json
from gdro.common.terminal import tell
from gdro.evaluation.gallery import PIXEL_ART
from gdro.runner.directory import alone
from gdro.tools.arena.blind import MAX_NAME, Arena, Refused, rater_name
from gdro.tools.arena.pairs import draw_pairs, open_models
from gdro.tools.arena.table import results
from gdro.tools.arena.votes import FILE, QUESTIONS, Votes

MAX_BODY = 4096  # bytes per request; a vote takes about two hundred


class Server(ThreadingHTTPServer):
    """Serves one Arena. `rater`: the only rater, so the page does not ask for a name."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], arena: Arena, rater: str | None) -> None:
        self.arena, self.rater = arena, rater
        self.open_to_network = not _is_loopback(address[0])
        self.names = {"localhost", address[0].lower()}
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        store = next(iter(arena.stores.values()))
        height, width = store.image_size(store.group_ids[0])
        self.page_values = {
            "questions": QUESTIONS,
            "rater": rater or "",
            "max_name": MAX_NAME,
            "width": width,
            "height": height,
            "pixels": max(width, height) <= PIXEL_ART,
        }
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        self.page = environment.from_string((files("gdro.tools.arena") / "page.html").read_text(encoding="utf-8"))
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        """The address of the page."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report on stderr what broke; a browser that disconnected is not an error."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            tell(f"gdro arena: {type(error).__name__}: {error}")


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "gdro", ""
    timeout = 60  # seconds; a silent connection does not hold its thread forever

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: the terminal belongs to the results."""

    def _answer(self, act: Any) -> None:
        try:
            self._check_source()
            act()
        except Refused as refused:
            self.close_connection = True  # its body may not have been read
            self._send_json(refused.status, {"error": str(refused)})
        except (sqlite3.Error, UserError) as error:
            tell(f"gdro arena: {error}")
            self._send_json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "failed; the server's terminal says why"})

    def _check_source(self) -> None:
        """Refuse requests from other sites' pages, including sites whose name was pointed here (DNS rebinding)."""
        host = self.headers.get("Host", "").lower()
        try:
            name = urlsplit(f"//{host}").hostname or ""
            origin = urlsplit(self.headers.get("Origin", f"http://{host}")).netloc.lower()
        except ValueError:
            raise Refused(HTTPStatus.BAD_REQUEST, "expected a valid Host and Origin") from None
        allowed = _is_address if self.server.open_to_network else _is_loopback
        if name not in self.server.names and not allowed(name):
            raise Refused(HTTPStatus.FORBIDDEN, "expected the address that gdro arena printed")
        if origin != host:
            raise Refused(HTTPStatus.FORBIDDEN, "expected a request from the study's own page")

    def _get(self) -> None:
        if self.path == "/":
            nonce = secrets.token_urlsafe(16)
            policy = (
                f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data:; "
                "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            )
            page = self.server.page.render(self.server.page_values, nonce=nonce)
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", page.encode(), {"Content-Security-Policy": policy})
        elif self.path.startswith("/image/"):
            self._send(HTTPStatus.OK, "image/png", self.server.arena.image(self.path.removeprefix("/image/")))
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "no such page")

    def _post(self) -> None:
        """`/state` {rater}, `/vote` {rater, pair, question, choice}, `/undo` {rater, pair, question}.

        Each answers with the rater's state, even for a vote or undo that came too late (409).
        """
        fields = {"/state": (), "/vote": ("pair", "question", "choice"), "/undo": ("pair", "question")}.get(self.path)
        if fields is None:
            raise Refused(HTTPStatus.NOT_FOUND, "no such page")
        body = self._body()
        if body.keys() != {"rater", *fields} or not all(isinstance(value, str) for value in body.values()):
            raise Refused(HTTPStatus.BAD_REQUEST, f"expected the strings {', '.join(('rater', *fields))}")
        arena, rater = self.server.arena, rater_name(body.pop("rater"))
        if self.server.rater not in (None, rater):
            raise Refused(HTTPStatus.FORBIDDEN, "this study runs for one rater only")
        done = True
        if fields:
            done = (arena.vote if self.path == "/vote" else arena.undo)(rater, **body)
        self._send_json(HTTPStatus.OK if done else HTTPStatus.CONFLICT, arena.state(rater))

    def _body(self) -> dict[str, Any]:
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if int(length) > MAX_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {MAX_BODY} bytes")
        try:
            body = parse_json(self.rfile.read(int(length)), "the body")
        except UserError:
            raise Refused(HTTPStatus.BAD_REQUEST, "expected JSON") from None
        if not isinstance(body, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "expected a JSON object")
        return body

    def _send_json(self, status: HTTPStatus, value: Any) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        fixed = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in (fixed | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def arena(
    runs: Sequence[Path],
    out: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    rater: str | None = None,
    seed: int | None = None,
    pairs: int | None = None,
) -> str:
    """Serve the study of `runs` in `out` until Ctrl-C; returns the tables as text. A study begun there resumes.

    `seed` and `pairs` (the number of image pairs) default to those the study was begun with; a new one uses seed 0 and
    every prompt once for every two models. Raises UserError before serving anything.
    """
    if rater is not None:
        try:
            rater = rater_name(rater)
        except Refused as refused:
            raise UserError(f"--rater is {rater!r}: {refused}") from None
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}; expected 0 (any free one) to 65535")
    models = open_models(runs)
    with alone(out), closing(Votes(out, begin=True)) as votes:
        begun = votes.study()
        if begun is not None:
            seed = begun.seed if seed is None else seed
            pairs = len(begun.pairs) if pairs is None else pairs
        seed = 0 if seed is None else seed
        digests = {model.name: fingerprint(model.store.contents) for model in models}
        votes.begin(digests, draw_pairs(models, pairs, seed=seed), seed)
        study = votes.study()
        assert study is not None
        try:
            server = Server((host, port), Arena(models, votes, study), rater)
        except OSError as error:
            raise UserError(f"--host {host} --port {port}: {error.strerror}; expected a free address") from None
        with server:
            tell(f"gdro arena: {len(study.pairs)} pairs at {server.url} (Ctrl-C to stop)")
            if server.open_to_network:
                tell(f"gdro arena: --host {host}: anyone who can reach it can look and vote")
            try:
                server.serve_forever(poll_interval=0.1)
            except KeyboardInterrupt:
                tell("")
        return results(study, votes.all())


def arena_table(folder: Path) -> str:
    """The tables of the study in `folder`, as text; a server may be using it. UserError if there is no study."""
    with closing(Votes(folder)) as votes:
        study = votes.study()
        if study is None:
            raise UserError(f"{folder / FILE} holds no study; expected one that `gdro arena` has begun")
        return results(study, votes.all())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)
