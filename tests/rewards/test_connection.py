"""The way to a judge and back: its key is shown nowhere, and the environment's proxies and certificates are used."""

import html
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from fake_endpoint import FakeEndpoint, Said, echo, number, questions, serving

from gdro.common.errors import UserError
from gdro.rewards.judges.connection import find_proxy
from gdro.rewards.judges.endpoint import Endpoint


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[FakeEndpoint, Endpoint]]]:
    with serving(tmp_path, monkeypatch) as start:
        yield start


def test_api_key_is_sent_and_never_shown(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret\n")
    server, judge = serve(lambda asked: Said("1"), api_key_env="JUDGE_KEY")
    judge.ask(questions(1), number)
    assert server.asked[0].headers["Authorization"] == "Bearer sk-secret"
    _, judge = serve(
        lambda asked: Said(status=401, raw=b"bad key sk-secret"), None, api_key_env="JUDGE_KEY", cache=None
    )
    with pytest.raises(UserError, match=r"HTTP 401: bad key \*\*\*.*api_key_env JUDGE_KEY") as error:
        judge.check()
    assert "secret" not in str(error.value) + repr(judge)


def echoes(key: str) -> dict[str, str]:
    """A reply that holds the key, in ways in which a server may repeat it."""
    inner = json.dumps({"Authorization": f"Bearer {key}"})
    ways = {
        "plain": key,
        "header": f"{{'Authorization': 'Bearer {key}'}}",
        "JSON": inner,
        "JSON twice": json.dumps(inner),
    }
    ways |= {
        "URL": quote(key, safe=""),
        "query": quote_plus(key),
        "HTML": html.escape(key),
        "Go": inner.replace("<", "\\u003c"),
    }
    return ways | {
        "repr": repr(key),
        "PHP": json.dumps(key).replace("/", "\\/"),
        "code": "".join(f"&#{ord(c)};" for c in key),
    }


@pytest.mark.parametrize("key", ["sk-secret", "sk-'a\"b\\<c>/%d+e&"])
@pytest.mark.parametrize("way", echoes(""))
def test_an_echoed_key_is_nowhere(serve: Any, monkeypatch: pytest.MonkeyPatch, key: str, way: str) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    said = f"<{echoes(key)[way]}> Score: 3"
    masked = re.compile(r"<.*\*\*\*.*> Score: 3")
    spelled = {echoes(key)[w].strip("\"'") for w in ("plain", "URL", "query", "HTML", "repr", "PHP", "code")}

    def hidden(text: str | None) -> bool:
        return masked.search(text or "") is not None and not any(s in (text or "") for s in spelled)

    server, judge = serve(lambda asked: Said(said), api_key_env="JUDGE_KEY")
    seen: list[str] = []
    ((_, answer),) = judge.ask(questions(1), lambda text: seen.append(text) or 3.0)
    assert server.asked[0].headers["Authorization"] == f"Bearer {key}"
    with sqlite3.connect(str(judge.cache)) as file:
        kept = file.execute("SELECT reply FROM replies").fetchone()[0]
    assert all(map(hidden, [*seen, answer.text, kept]))
    judge.cache and Path(judge.cache).unlink()
    ((_, answer),) = judge.ask(questions(1), number)
    assert hidden(answer.reason)
    for raw in (said.encode(), json.dumps({"error": {"message": said}}).encode()):
        _, judge = serve(lambda asked, raw=raw: Said(status=400, raw=raw), None, api_key_env="JUDGE_KEY")  # type: ignore[misc]
        with pytest.raises(UserError) as error:
            judge.check()
        assert hidden(str(error.value))


def test_a_placeholder_of_a_key_hides_nothing(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "1")
    _, judge = serve(lambda asked: Said("1"), api_key_env="JUDGE_KEY")
    assert judge.ask(questions(1), number)[0][0] == 1


@pytest.mark.parametrize(("key", "found"), [(None, "not set"), ("  ", "not set"), ("a\nb", "not a line of ASCII")])
def test_missing_api_key_is_refused(serve: Any, monkeypatch: pytest.MonkeyPatch, key: str | None, found: str) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("JUDGE_KEY", key)
    _, judge = serve(lambda asked: Said("1"), api_key_env="JUDGE_KEY")
    with pytest.raises(UserError, match=f"api_key_env: the variable JUDGE_KEY is {found}"):
        judge.check()


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets variables, in an environment that has none of those of proxies and certificates."""
    for name in (*PROXIES, *map(str.upper, PROXIES), "SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"):
        monkeypatch.delenv(name, raising=False)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()] and None


@pytest.mark.parametrize(
    "variables",
    [
        {"HTTP_PROXY": "http://127.0.0.1:9"},  # nobody is there
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"http_proxy": "http://[::1"},
        {"NO_PROXY": "[::1]", "HTTP_PROXY": "http://127.0.0.1:9"},
        {"SSL_CERT_FILE": "/nowhere/cert.pem"},
    ],
)
def test_a_judge_on_this_machine_is_asked_whatever_the_environment_says_of_others(
    serve: Any, environment: Any, variables: dict[str, str]
) -> None:
    environment(**variables)
    _, judge = serve(echo)
    judge.check()
    assert judge.ask(questions(2), number)[1][0] == 1


@pytest.mark.parametrize(
    ("url", "variables", "found"),
    [
        ("http://judge.test:8000/v1", {"HTTP_PROXY": "proxy:3128"}, ("HTTP_PROXY", "http://proxy:3128")),
        ("https://judge.test/v1", {"https_proxy": "http://proxy:1"}, ("https_proxy", "http://proxy:1")),
        (
            "https://judge.test/v1",
            {"ALL_PROXY": "http://proxy:1", "NO_PROXY": "[::1]"},
            ("ALL_PROXY", "http://proxy:1"),
        ),
        ("https://judge.test/v1", {"HTTP_PROXY": "http://proxy:1"}, (None, None)),
        ("http://judge.test:8000/v1", {"HTTP_PROXY": "http://proxy:1", "NO_PROXY": "[::1],.test"}, (None, None)),
        ("http://[fd00::1]:8000/v1", {"HTTP_PROXY": "http://proxy:1", "NO_PROXY": "fd00::1"}, (None, None)),
        *[
            (f"http://{host}:8000/v1", {"HTTP_PROXY": "http://proxy:1", "ALL_PROXY": "x://"}, (None, None))
            for host in ("localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0")
        ],
    ],
)
def test_the_proxy_of_a_server(environment: Any, url: str, variables: dict[str, str], found: tuple[str, str]) -> None:
    environment(**variables)
    assert find_proxy(url) == found


@pytest.mark.parametrize(
    ("url", "variable", "value", "said"),
    [
        (
            "http://judge.test/v1",
            "ALL_PROXY",
            "socks5://me:pass@proxy:1080",
            "ALL_PROXY is socks5://proxy:1080, .*socks",
        ),
        ("http://judge.test/v1", "HTTP_PROXY", "ftp://proxy", "HTTP_PROXY is ftp://proxy, which cannot be used"),
        ("http://judge.test/v1", "http_proxy", "http://me:pass@proxy:port", "http_proxy is http://proxy:port, "),
        ("http://judge.test/v1", "HTTP_PROXY", "http://[::1", "HTTP_PROXY is "),
        ("https://judge.test/v1", "SSL_CERT_FILE", "/nowhere/cert.pem", "SSL_CERT_FILE is /nowhere/cert.pem; "),
        ("https://judge.test/v1", "SSLKEYLOGFILE", "/nowhere/keys", "SSLKEYLOGFILE is /nowhere/keys; "),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(
    environment: Any, url: str, variable: str, value: str, said: str
) -> None:
    environment(**{variable: value})
    with pytest.raises(UserError, match=said) as error:
        Endpoint(url, "judge").check()
    assert "pass" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_failure_by_way_of_a_proxy_names_its_variable(serve: Any, environment: Any) -> None:
    server, _ = serve(echo)
    environment(HTTP_PROXY=server.url.removesuffix("/v1"))
    with pytest.raises(UserError, match=r"HTTP 404: Not Found \(by way of the proxy in HTTP_PROXY\)"):
        Endpoint("http://judge.test:8000/v1", "judge").check()
    environment(HTTP_PROXY="http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"does not answer \(connection failed: .*the proxy in HTTP_PROXY\)"):
        Endpoint("http://judge.test:8000/v1", "judge").check()
