"""Questions about images for a model behind an OpenAI-compatible endpoint (vLLM, SGLang, `transformers serve`, ...).

Replies are kept in a SQLite file under a digest of the question, so a killed run never asks twice. An answer that
several attempts cannot get is missing, with a reason, and never a score.
"""

import asyncio
import hashlib
import json
import os
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from PIL import Image

from gdro.common.errors import UserError, did_you_mean
from gdro.common.files import fingerprint
from gdro.common.images import to_rgb
from gdro.rewards.judges.completions import (
    Reply,
    Unread,
    base_url,
    error_message,
    model_names,
    reply_text,
    request_body,
    short,
)
from gdro.rewards.judges.connection import Connection, Failed
from gdro.rewards.judges.replies import Replies, open_replies

T = TypeVar("T")

BACKOFF, LONGEST_BACKOFF = 0.5, 30.0  # seconds before the second attempt, doubled for each further one; maximum
REASKS = 2  # after a reply that does not parse; at temperature 0 the next is nearly always the same
LIST_SECONDS = 10.0  # a server that lists its models does so at once
OF_ONE_QUESTION = (400, 413, 422)  # servers' statuses for a question that is too long or not accepted


@dataclass(frozen=True)
class Question:
    """One user message: the images, as PNG, before the text, as the judges were trained."""

    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The model's reply, or None and the `reason` it is missing."""

    text: str | None
    reason: str | None = None


class _Refused(UserError):
    """The server will not accept the request however often it is sent; `said` is why."""

    def __init__(self, message: str, said: str, status: int) -> None:
        super().__init__(message)
        self.said, self.status = said, status


class _Again(Exception):
    """The request failed but may succeed if sent again after `wait` seconds (or our own back-off, if longer)."""

    def __init__(self, reason: str, wait: float = 0.0, *, reached: bool = True, status: int | None = None) -> None:
        super().__init__(reason)
        self.wait, self.reached, self.status = wait, reached, status


@dataclass(frozen=True)
class Endpoint:
    """A model behind `<url>/chat/completions`; `http://host:8000` means `http://host:8000/v1`.

    `revision` identifies the weights the server runs under the model's name. No server reports them, so give the commit
    it was started from; stored replies of other weights are then not reused. `timeout` is in seconds per request,
    `cache` is the file of replies (default: gdro/judge.sqlite in the user's cache; SQLite needs a local disk), and the
    API key is read from the environment variable `api_key_env`. Raises UserError for an invalid setting.
    """

    url: str
    model: str
    api_key_env: str | None = None
    revision: str | None = None
    concurrency: int = 8
    timeout: float = 120.0
    attempts: int = 5
    max_tokens: int = 1024
    temperature: float = 0.0
    cache: str | None = None

    def __post_init__(self) -> None:
        if base_url(self.url) is None:
            raise UserError(f'judge url: "{self.url}" is not an address; expected e.g. http://localhost:8000/v1')
        if "@" in urlsplit(self.url).netloc:
            raise UserError("judge url: it holds a user or password; expected none, name a variable in api_key_env")
        if not self.model:
            raise UserError("judge model: nothing given; expected the name the server has for it")
        for name in ("concurrency", "timeout", "attempts", "max_tokens"):
            if not getattr(self, name) > 0:
                raise UserError(f"judge {name}: {getattr(self, name)}; expected more than 0")
        if not self.temperature >= 0:
            raise UserError(f"judge temperature: {self.temperature}; expected 0 or more")

    @property
    def version(self) -> str:
        """Changes with everything that may change a reply."""
        return fingerprint(self.model, self.revision, self.temperature, self.max_tokens)

    def check(self) -> None:
        """Raise UserError if the server cannot be reached, refuses the key, or does not serve the model."""
        _run(self._check())

    def ask(self, questions: Sequence[Question], parse: Callable[[str], T | None]) -> list[tuple[T | None, Answer]]:
        """What `parse` returns for the reply to each question, and the reply; (None, why) if it is missing.

        At most `concurrency` requests run at once. Connection errors, timeouts, 408, 429 and 5xx are retried with
        growing pauses; replies that are cut short or that do not parse (None) are retried at most twice; `attempts`
        requests in all. A question that the server itself rejects (400, 413, 422) is missing at once. Only replies that
        parse are kept, equal questions are asked once, and other processes may use the same cache. Raises UserError if
        the server refuses any question (other 4xx, or a greeting too), or if it answered none and `check` knows why.
        """
        keys = [self._key(question) for question in questions]
        left = dict(zip(keys, questions, strict=True))
        found: dict[str, tuple[T | None, Answer]] = {}
        with open_replies(self.cache) as replies:
            for key in list(left):
                kept = replies.get(key)
                value = None if kept is None else parse(kept)
                if value is not None:
                    found[key] = value, Answer(kept)
                    del left[key]
            if left:
                asked = _run(self._ask_all(left, parse, replies))
                found |= asked
                if all(answer.text is None for _, answer in asked.values()):
                    self.check()
        return [found[key] for key in keys]

    def _key(self, question: Question) -> str:
        """Digest of everything that decides the reply, except `max_tokens`: an uncut reply does not depend on it."""
        pixels = [[i.size, hashlib.sha256(to_rgb(i).tobytes()).hexdigest()] for i in question.images]
        content = [self.model, self.revision, self.temperature, question.text, pixels]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    async def _ask_all(
        self, left: Mapping[str, Question], parse: Callable[[str], T | None], replies: Replies
    ) -> dict[str, tuple[T | None, Answer]]:
        found: dict[str, tuple[T | None, Answer]] = {}
        queue = iter(left.items())

        async def work() -> None:
            for key, question in queue:
                try:
                    found[key] = await self._ask(server, question, parse)
                except _Refused as refusal:
                    if refusal.status not in OF_ONE_QUESTION:
                        raise
                    await self._try_plain(server, question, refusal)
                    found[key] = None, Answer(None, refusal.said)
                answer = found[key][1]
                if answer.text is not None:
                    replies.keep(key, answer.text)

        async with self._connect() as server:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.concurrency, len(left))):
                        group.create_task(work())
            except BaseExceptionGroup as errors:  # the first one canceled the others
                raise errors.exceptions[0] from None
        return found

    async def _try_plain(self, server: Connection, question: Question, refusal: _Refused) -> None:
        """Raise `refusal` if the server also refuses a greeting with gray images of the question's sizes."""
        gray = tuple(Image.new("RGB", image.size, "gray") for image in question.images)
        try:
            await self._ask(server, Question("Hello", gray), lambda text: text)
        except _Refused:
            raise refusal from None

    async def _ask(
        self, server: Connection, question: Question, parse: Callable[[str], T | None]
    ) -> tuple[T | None, Answer]:
        body = await asyncio.to_thread(self._body, question, self.max_tokens)  # encoding an image takes a while
        reason, unread = "", 0
        for attempt in range(self.attempts):
            try:
                text = reply_text(await self._send(server, "POST", "/chat/completions", body))
                value = parse(text)
                if value is not None:
                    return value, Answer(text)
                raise Unread(f"reply without the requested answer: {short(text)!r}")
            except Unread as error:
                reason, unread, wait = str(error), unread + 1, 0.0
                if unread > REASKS:
                    break
            except _Again as error:
                pause = min(LONGEST_BACKOFF, BACKOFF * 2**attempt)
                reason, wait = str(error), max(error.wait, random.uniform(pause / 2, pause))  # affects no result
            if attempt + 1 < self.attempts:
                await asyncio.sleep(wait)
        return None, Answer(None, reason)

    def _body(self, question: Question, max_tokens: int) -> bytes:
        return request_body(
            self.model, question.text, question.images, max_tokens=max_tokens, temperature=self.temperature
        )

    def _connect(self) -> Connection:
        key = None if self.api_key_env is None else self._api_key(self.api_key_env)
        return Connection(base_url(self.url) or "", key, self.concurrency)

    def _api_key(self, variable: str) -> str:
        key = os.environ.get(variable, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            found = "not set" if not key else "not a line of ASCII"
            raise UserError(f"judge api_key_env: the variable {variable} is {found}; expected the API key")
        return key

    async def _send(self, server: Connection, method: str, path: str, body: bytes | None = None) -> Reply:
        """The reply if it is a success. Raises _Again, _Refused or Unread."""
        limit = self.timeout if method == "POST" else min(self.timeout, LIST_SECONDS)
        try:
            reply = await server.send(method, path, body, limit)
        except Failed as error:
            raise _Again(str(error), reached=error.reached) from None
        if reply.status < 300:
            return reply
        said = f"HTTP {reply.status}: {error_message(reply)}{server.way}"
        if reply.status in (408, 429) or reply.status >= 500:
            raise _Again(said, min(self.timeout, reply.wait), status=reply.status)
        key = f"the key is that of api_key_env {self.api_key_env}" if self.api_key_env else "no api_key_env is given"
        hint = f"; {key}" if reply.status in (401, 403) else ""
        raise _Refused(f"judge {self.url} refused the request ({said}){hint}", said, reply.status)

    async def _check(self) -> None:
        async with self._connect() as server:
            for attempt in range(self.attempts):
                try:
                    return await self._check_model(server)
                except (_Again, Unread) as error:
                    if not getattr(error, "reached", True) or attempt + 1 == self.attempts:
                        raise UserError(
                            f"judge url: {self.url} does not answer ({error}); expected a running server with an "
                            "OpenAI-compatible API"
                        ) from None
                    await asyncio.sleep(BACKOFF)

    async def _check_model(self, server: Connection) -> None:
        served: list[str] = []
        try:
            served = model_names(await self._send(server, "GET", "/models"))
        except (_Refused, _Again) as error:
            if error.status in (None, 401, 403):
                raise
        except Unread:
            pass
        if served and self.model not in served:
            raise UserError(f'judge model: {self.url} serves no "{self.model}"{did_you_mean(self.model, served)}')
        if not served:  # not every server lists its models; a minimal question also tells
            await self._send(server, "POST", "/chat/completions", self._body(Question("Hello"), 1))


def _run(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` that also works in a notebook, where a loop is already running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
