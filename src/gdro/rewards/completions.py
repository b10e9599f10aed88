"""The OpenAI chat-completions format: what is sent, and how what comes back is read (dictionaries and text only)."""

import base64
import io
import json
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from PIL import Image

from gdro.images import to_rgb

if TYPE_CHECKING:
    import httpx


class Unread(Exception):
    """A reply came, and nothing can be read in it."""


def base_url(url: str) -> str | None:
    """The address to which /models and /chat/completions are added; None if `url` is none of a server."""
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
    """One user message, the images before the text."""
    content: list[dict] = [{"type": "image_url", "image_url": {"url": _data_uri(image)}} for image in images]
    content.append({"type": "text", "text": text})
    messages = [{"role": "user", "content": content}]
    request = {"model": model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
    return json.dumps(request).encode()


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    to_rgb(image).save(file, "PNG", compress_level=1)  # lossless at any level, and the way is short
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def reply_text(response: "httpx.Response") -> str:
    """The text of a completion. Raises Unread if there is none or it was cut off."""
    try:
        choice = response.json()["choices"][0]
        text, finished = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise Unread(f"no completion: {short(response.text)!r}") from None
    if finished == "length":
        raise Unread(f"reply cut short at max_tokens: {short(str(text))!r}")
    if not isinstance(text, str):
        raise Unread(f"reply without text (finish_reason {finished!r})")
    return text.encode(errors="replace").decode()  # JSON can hold half a surrogate pair, files cannot


def model_names(response: "httpx.Response") -> list[str]:
    """Of a list of models; empty if it is none."""
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def error_message(response: "httpx.Response") -> str:
    """What the server says went wrong."""
    try:
        said = response.json()
    except ValueError:
        return response.text
    for key in ("error", "detail", "message"):
        if isinstance(said, dict) and said.get(key):
            said = said[key]
    return said if isinstance(said, str) else json.dumps(said)


def retry_after(response: "httpx.Response") -> float:
    """Seconds the server asks us to wait, which it may say as a date."""
    asked = response.headers.get("Retry-After", "0")
    try:
        seconds = float(asked) if asked.isdigit() else parsedate_to_datetime(asked).timestamp() - time.time()
    except ValueError:
        return 0.0
    return max(0.0, seconds)


def short(text: str, most: int = 200) -> str:
    """On one line, cut."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."
