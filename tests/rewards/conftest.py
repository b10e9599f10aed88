"""The client of a judge's endpoint and a server for it, shared by the tests of both."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import Asked, FakeEndpoint, Said

from gdro.rewards import endpoint as client
from gdro.rewards.endpoint import Endpoint


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[FakeEndpoint, Endpoint]]]:
    """`serve(behave, **settings)`: a running server and a client of it, with short pauses and a cache of its own."""
    monkeypatch.setattr(client, "BACKOFF", 0.01)
    servers: list[FakeEndpoint] = []

    def start(
        behave: Callable[[Asked], Said], models: tuple[str, ...] | None = ("judge",), **settings: Any
    ) -> tuple[FakeEndpoint, Endpoint]:
        servers.append(FakeEndpoint(behave, models).__enter__())
        settings = {"url": servers[-1].url, "model": "judge", "cache": str(tmp_path / "judge.sqlite")} | settings
        return servers[-1], Endpoint(**settings)

    yield start
    for server in servers:
        server.__exit__(None, None, None)
