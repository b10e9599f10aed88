"""The OpenAI chat-completions format: building requests and reading replies (dictionaries and text only)."""

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from gdro.common.images import to_rgb

CUT = {"length": "at max_tokens", "content_filter": "by a content filter"}  # finish_reason of a partial reply


@dataclass(frozen=True)
class Reply:
    """A server's reply: `said` is the JSON in `text`, or `text` itself if it is not JSON; neither contains the key.

    `status` is that of an error in the body if the server sent it as a success.
    """

    status: int
    text: str
    said: Any
    wait: float  # seconds the server asks us to wait


class Unread(Exception):
    """A reply came but cannot be read."""


def base_url(url: str) -> str | None:
    """The address that /models and /chat/completions are appended to; None if `url` is not a server's address."""
    try:
        parts = urlsplit(url.strip())
        port_is_a_number = parts.port != 0
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_a_number:
        return None
    if parts.query or parts.fragment:
        return None
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def request_body(model: str, text: str, images: Sequence[Image.Image], *, max_tokens: int, temperature: float) -> bytes:
    """A request with one user message, the images before the text."""
    content: list[dict] = [{"type": "image_url", "image_url": {"url": _data_uri(image)}} for image in images]
    content.append({"type": "text", "text": text})
    messages = [{"role": "user", "content": content}]
    request = {"model": model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
    return json.dumps(request).encode()


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    to_rgb(image).save(file, "PNG", compress_level=1)  # lossless at any level; size matters little locally
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def reply_text(reply: Reply) -> str:
    """The text of a completion. Raises Unread if there is none or it was cut off."""
    try:
        choice = reply.said["choices"][0]
        text, finished = choice["message"]["content"], str(choice.get("finish_reason"))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Unread(f"no completion: {short(reply.text)!r}") from None
    if finished in CUT:
        raise Unread(f"reply cut short {CUT[finished]}: {short(str(text))!r}")
    if not isinstance(text, str):
        raise Unread(f"reply without text (finish_reason {short(finished, 40)!r})")
    return text.encode(errors="replace").decode()  # JSON can hold half a surrogate pair, files cannot


def model_names(reply: Reply) -> list[str]:
    """The names in a list of models; empty if it is not one."""
    try:
        return [str(model["id"]) for model in reply.said["data"]]
    except (KeyError, TypeError):
        return []


def stated_status(said: Any) -> int | None:
    """The HTTP status of an error that a gateway sent as a success; 500 if it has none, None if `said` is no error.

    Forms: `{"error": {"code": 429}}`, the same in the first of the `choices`, and vLLM's `{"object": "error"}`.
    """
    if not isinstance(said, dict):
        return None
    choices = said.get("choices")
    for holder in [said, *(choices[:1] if isinstance(choices, list) else [])]:
        if not isinstance(holder, dict) or not (holder.get("error") or holder.get("object") == "error"):
            continue
        for place in (holder.get("error"), holder):
            numbers = [place.get(name) for name in ("code", "status", "status_code")] if isinstance(place, dict) else []
            for number in numbers:
                if re.fullmatch("[45][0-9][0-9]", str(number)):
                    return int(str(number))
        return 500
    return None


def error_message(reply: Reply) -> str:
    """The server's own error message, or "no message"."""
    said = reply.said
    if isinstance(said, dict) and isinstance(said.get("choices"), list):
        said = next(iter(said["choices"]), said)
    for key in ("error", "detail", "message"):
        if isinstance(said, dict) and said.get(key):
            said = said[key]
    return short(said if isinstance(said, str) else reply.text) or "no message"


def short(text: str, most: int = 200) -> str:
    """The text on one line, cut to `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."
