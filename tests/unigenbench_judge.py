"""A small OpenAI-compatible server on the loopback whose judge looks at the image's mean color."""

import base64
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


class JudgeServer(ThreadingHTTPServer):
    """`asked` holds the text of each question; a reply depends on the image and the number of test points alone.

    From the `fails_from`-th question on every one is refused; images whose brightness is odd get a reply of garbage
    if `garbles`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.fails_from: int | None = None
        self.garbles = False
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def reply(self, text: str, brightness: int) -> str:
        points = re.search(r"<checkpoint>\[(.*?)\]</checkpoint>", text)
        assert points is not None
        count = len(re.findall(r"'[^']*'", points[1]))
        if self.garbles and brightness % 2:
            return "I cannot tell."
        scores = [brightness >> bit & 1 for bit in range(count)]
        return f"<analysis>{['seen'] * count}</analysis>\n<score>{scores}</score>"


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "judge", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = body["messages"][-1]["content"]
        images = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"] if parts else []
        if not images:  # whatever is asked to see whether the judge is there
            return self._send(200, _completion("yes"))
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        with self.server.lock:
            self.server.asked.append(text)
            failing = self.server.fails_from is not None and len(self.server.asked) > self.server.fails_from
        if failing:
            return self._send(400, {"error": {"message": "out of order"}})
        image = Image.open(io.BytesIO(base64.b64decode(images[0].partition(",")[2])))
        return self._send(200, _completion(self.server.reply(text, int(np.asarray(image.convert("RGB")).sum()) // 64)))

    def _send(self, code: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def _completion(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
