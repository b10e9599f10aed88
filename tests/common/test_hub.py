"""Weights on the Hub, which is here a server on loopback."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Gated(BaseHTTPRequestHandler):
    """A repository that everybody may see and nobody may read."""

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        body = json.dumps({"id": "owner/model", "sha": "0" * 40}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.end_headers()


@pytest.fixture
def gated_hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gated)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_gated_weights_say_how_to_get_them(gated_hub: str, tmp_path: Path) -> None:
    """In a process of its own: the Hub's address is read when its client is imported."""
    environment = os.environ | {"HF_ENDPOINT": gated_hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    wanted = "'owner/model', 'model_index.json', field='model', expected='a model'"
    program = f"from gdro.common.hub import locate; locate({wanted})"
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    line = found.stderr.strip().splitlines()[-1]
    assert line.startswith("gdro.common.errors.UserError: model: owner/model is gated; expected its terms accepted")
    assert "hf auth login" in line
