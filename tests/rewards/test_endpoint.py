"""The client of a judge's endpoint, against a real HTTP server that fails in the ways servers do."""

import asyncio
import gzip
import json
import pickle
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import Asked, FakeEndpoint, Said, echo, number, questions, serving
from PIL import Image

from gdro.common.errors import UserError
from gdro.rewards.judges import endpoint as client
from gdro.rewards.judges.connection import LONGEST_REPLY
from gdro.rewards.judges.endpoint import Answer, Endpoint, Question

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[FakeEndpoint, Endpoint]]]:
    with serving(tmp_path, monkeypatch) as start:
        yield start


def test_request_has_the_images_before_the_text_pixel_by_pixel(serve: Any) -> None:
    server, judge = serve(lambda asked: Said("4.5"), max_tokens=77)
    images = (Image.linear_gradient("L").resize((31, 17)).convert("RGB"), Image.new("RGBA", (8, 8), (250, 3, 9, 255)))
    assert judge.ask([Question('Is it "rot"? 「赤」', images)], number) == [(4.5, Answer("4.5"))]
    body = server.asked[0].body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 77)
    assert [part["type"] for part in server.asked[0].content] == ["image_url", "image_url", "text"]
    assert server.asked[0].content[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert server.asked[0].text == 'Is it "rot"? 「赤」'
    assert [i.tobytes() for i in server.asked[0].images] == [i.convert("RGB").tobytes() for i in images]


def test_answers_keep_the_order_of_the_questions(serve: Any) -> None:
    _, judge = serve(lambda asked: Said(echo(asked).content, delay=0.03 * (asked.number % 3)))
    assert [value for value, _ in judge.ask(questions(30), number)] == list(range(30))


@pytest.mark.parametrize("concurrency", [1, 5])
def test_concurrency_is_bounded_and_used(serve: Any, concurrency: int) -> None:
    together = threading.Barrier(concurrency, timeout=10)  # nobody is answered before so many have asked

    def behave(asked: Asked) -> Said:
        together.wait()
        return Said(echo(asked).content, delay=0.01)

    server, judge = serve(behave, concurrency=concurrency)
    assert [value for value, _ in judge.ask(questions(20), number)] == list(range(20))
    assert server.most_in_flight == concurrency


FAULTS = {
    "500": Said(status=500, raw=b"oops"),
    "503": Said(status=503, raw=b'{"error": {"message": "loading"}}'),
    "408": Said(status=408, raw=b"{}"),
    "429": Said(status=429, raw=b'{"message": "slow down"}'),
    "reset": Said(reset=True),
    "too slow": Said("1", delay=1.0),
    "not JSON": Said(raw=b"<html>gateway</html>"),
    "not a completion": Said(raw=b'{"choices": []}'),
    "no text": Said(None),
    "garbage": Said("I would rather not"),
    "cut off": Said("4", finish_reason="length"),  # the rest of 4.5
    "filtered": Said("4", finish_reason="content_filter"),
    "too long": Said("4" * LONGEST_REPLY),
    "too long packed": Said(raw=gzip.compress(b" " * 100_000_000 + b"{}"), headers={"Content-Encoding": "gzip"}),
    "half a gzip": Said(raw=gzip.compress(b"{}" * 100)[:-9], headers={"Content-Encoding": "gzip"}),
    "no gzip": Said(raw=b"{}", headers={"Content-Encoding": "gzip"}),
    "not asked for": Said(raw=b"{}", headers={"Content-Encoding": "br"}),
    "deep": Said(raw=b"[" * 100_000),
    "digits": Said(raw=b"9" * 5000),
    "other charset": Said(raw=b"{}", headers={"Content-Type": "application/json; charset=hex"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again(serve: Any, fault: str) -> None:
    server, judge = serve(lambda asked: FAULTS[fault] if asked.number == 0 else Said("4.5"), timeout=0.4)
    assert judge.ask(questions(1), number) == [(4.5, Answer("4.5"))]
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("fault", "requests"), [("503", 5), ("reset", 5), ("garbage", 3), ("cut off", 3), ("too long packed", 3)]
)
def test_what_always_fails_is_missing_with_its_reason(serve: Any, fault: str, requests: int) -> None:
    def behave(asked: Asked) -> Said:
        return FAULTS[fault] if asked.text == "What is 1?" else echo(asked)

    server, judge = serve(behave)
    found = judge.ask(questions(3), number)
    assert [value for value, _ in found] == [0.0, None, 2.0]
    assert found[1][1].text is None
    said = {
        "503": "HTTP 503: loading",
        "reset": "connection failed",
        "garbage": "I would rather",
        "cut off": "cut short",
        "too long packed": "reply longer than 4 MiB",
    }
    assert said[fault] in (found[1][1].reason or "")
    assert len(server.asked) == 2 + requests


def test_the_server_says_how_long_to_wait(serve: Any) -> None:
    wait = {"Retry-After": "1"}
    server, judge = serve(lambda asked: Said(status=429, raw=b"{}", headers=wait) if asked.number == 0 else Said("1"))
    judge.ask(questions(1), number)
    assert server.asked[1].time - server.asked[0].time >= 1


def test_the_pauses_grow(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF", 0.08)
    server, judge = serve(lambda asked: FAULTS["500"] if asked.number < 4 else Said("1"))
    judge.ask(questions(1), number)
    times = [asked.time for asked in server.asked]
    for i, (before, after) in enumerate(pairwise(times)):
        assert after - before >= 0.04 * 2**i  # half of it is left to chance


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_is_refused_of_one_question_is_missing_with_its_reason(serve: Any, status: int) -> None:
    refusal = Said(status=status, raw=b'{"error": {"message": "too long\\nfor me"}}')
    server, judge = serve(lambda asked: refusal if asked.text == "What is 7?" else echo(asked))
    found = judge.ask(questions(20), number)
    assert [value for value, _ in found] == [None if i == 7 else i for i in range(20)]
    assert found[7][1] == Answer(None, f"HTTP {status}: too long for me")
    assert sum(asked.text == "What is 7?" for asked in server.asked) == 1


def test_a_question_that_is_refused_alone_is_missing_if_a_plain_one_is_not(serve: Any) -> None:
    server, judge = serve(lambda asked: Said("hi") if asked.text == "Hello" else Said(status=400, raw=b"moderated"))
    image = Image.new("RGB", (40, 30), "red")
    found = judge.ask([Question(f"What is {i}?", (image,)) for i in range(20)], number)
    assert found == [(None, Answer(None, "HTTP 400: moderated"))] * 20
    plain = [asked for asked in server.asked if asked.text == "Hello"]
    assert len(plain) == 20
    assert [(i.size, i.getcolors()) for i in plain[0].images] == [((40, 30), [(1200, (128, 128, 128))])]


def test_a_server_that_refuses_a_plain_question_too_is_the_users_mistake(serve: Any) -> None:
    refusal = Said(status=400, raw=b'{"object": "error", "message": "At most 1 image\\nmay be provided"}')
    server, judge = serve(lambda asked: refusal)
    with pytest.raises(UserError, match="HTTP 400: At most 1 image may be provided") as error:
        judge.ask(questions(100), number)
    assert "\n" not in str(error.value)
    assert len(server.asked) <= 2 * judge.concurrency


def test_a_server_that_comes_to_refuse_everything_stops(serve: Any) -> None:
    server, judge = serve(lambda asked: echo(asked) if asked.number < 7 else Said(status=400, raw=b"no"), concurrency=1)
    with pytest.raises(UserError, match=r"refused the request .HTTP 400: no"):
        judge.ask(questions(20), number)
    assert len(server.asked) == 9


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_refusal_that_is_of_no_single_question_stops(serve: Any, status: int) -> None:
    server, judge = serve(
        lambda asked: Said(status=status, raw=b"no") if asked.text == "What is 7?" else echo(asked), concurrency=1
    )
    with pytest.raises(UserError, match=f"refused the request .HTTP {status}: no"):
        judge.ask(questions(20), number)
    assert len(server.asked) == 8


IN_A_SUCCESS = {
    "429": b'{"error": {"code": 429, "message": "slow down"}}',
    "as text": b'{"error": {"code": "429", "message": "slow down"}, "choices": []}',
    "no code": b'{"error": {"message": "overloaded", "type": "server_error"}}',
    "vLLM": b'{"object": "error", "message": "loading", "code": 503}',
    "in the choice": b'{"choices": [{"error": {"code": 502, "message": "upstream"}, "finish_reason": "error", '
    b'"message": {"content": "1"}}]}',
}


@pytest.mark.parametrize("form", IN_A_SUCCESS)
def test_an_error_sent_as_a_success_is_that_error(serve: Any, form: str) -> None:
    server, judge = serve(lambda asked: Said(raw=IN_A_SUCCESS[form]) if asked.number < 4 else Said("4.5"))
    assert judge.ask(questions(1), number) == [(4.5, Answer("4.5"))]
    assert len(server.asked) == 5  # a reply that does not parse is asked for three times


def test_a_refusal_sent_as_a_success_is_a_refusal(serve: Any) -> None:
    moderated = Said(raw=b'{"error": {"code": 400, "message": "moderated"}}')
    _, judge = serve(lambda asked: moderated if asked.text == "What is 1?" else echo(asked))
    assert judge.ask(questions(2), number)[1] == (None, Answer(None, "HTTP 400: moderated"))
    _, judge = serve(lambda asked: Said(raw=b'{"error": {"code": 401, "message": "who?"}}'), None)
    with pytest.raises(UserError, match="HTTP 401: who"):
        judge.check()


def test_a_server_that_dies_stops_the_run_rather_than_leave_all_missing(serve: Any) -> None:
    server, judge = serve(lambda asked: Said("1"), attempts=2)
    server.__exit__(None, None, None)
    with pytest.raises(UserError, match="does not answer"):
        judge.ask(questions(20), number)


def test_check_wants_the_model_by_its_name(serve: Any) -> None:
    server, judge = serve(lambda asked: Said("1"), ("CodeGoat24/UnifiedReward-2.0", "other"), model="UnifiedReward-2.0")
    with pytest.raises(UserError, match=r'no "UnifiedReward-2.0"; did you mean "CodeGoat24/UnifiedReward-2.0"'):
        judge.check()
    _, judge = serve(lambda asked: Said("1"), ("alpha", "beta"), model="judge")
    with pytest.raises(UserError, match="expected one of alpha, beta"):
        judge.check()
    assert not server.asked


def test_a_list_of_very_many_models_is_cut(serve: Any) -> None:
    for models in ([f"alpha-{i}" for i in range(100_000)], ["a" * 2_000_000]):
        _, judge = serve(lambda asked: Said("1"), tuple(models), model="judge")
        with pytest.raises(UserError, match=r'serves no "judge"; expected one of a') as error:
            judge.check()
        assert len(str(error.value)) < 3000
    _, judge = serve(lambda asked: Said("1"), ("a" * LONGEST_REPLY,), model="judge")
    judge.check()  # as of a server that has no list


def test_check_asks_a_server_that_lists_no_models(serve: Any) -> None:
    server, judge = serve(lambda asked: Said("1"), None)
    judge.check()
    assert server.asked[0].body["max_tokens"] == 1
    _, judge = serve(lambda asked: Said(status=404, raw=b'{"error": "no model judge"}'), None)
    with pytest.raises(UserError, match="HTTP 404: no model judge"):
        judge.check()


@pytest.mark.parametrize("failures", [2, 9])
def test_check_goes_on_if_the_server_has_a_bad_moment(serve: Any, failures: int) -> None:
    _, judge = serve(lambda asked: FAULTS["503"] if asked.number < failures else Said("1"), None)
    if failures < judge.attempts:
        return judge.check()
    with pytest.raises(UserError, match=r"does not answer \(HTTP 503: loading\)"):
        judge.check()


def test_check_says_at_once_that_nothing_is_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # a port that nobody listens on
        start = time.monotonic()
        with pytest.raises(UserError, match=r"judge url: http://127.0.0.1:\d+ does not answer \(connection failed"):
            Endpoint(f"http://127.0.0.1:{taken.getsockname()[1]}", "judge").check()
        assert time.monotonic() - start < 5


def test_check_gives_up_on_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LIST_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UserError, match=r"does not answer \(no reply in 0.3 s\)"):
            Endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}", "judge").check()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "localhost:8000"}, "not an address"),
        ({"url": "ftp://host/v1"}, "not an address"),
        ({"url": "http://host:port/v1"}, "not an address"),
        ({"url": "http://"}, "not an address"),
        ({"url": "http://host/v1?key=1"}, "not an address"),
        ({"url": "http://me:secret@host/v1"}, "user or password"),
        ({"model": ""}, "judge model"),
        ({"concurrency": 0}, "judge concurrency: 0"),
        ({"timeout": float("nan")}, "judge timeout: nan"),
        ({"attempts": 0}, "judge attempts: 0"),
        ({"temperature": -1.0}, "judge temperature: -1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        Endpoint(**({"url": "http://host:8000", "model": "judge"} | settings))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("ending", ["", "/", "/chat/completions", None])
def test_url_may_be_given_in_several_ways(serve: Any, ending: str | None) -> None:
    server, judge = serve(lambda asked: Said("1"))
    url = server.url.removesuffix("/v1") if ending is None else server.url + ending
    judge = Endpoint(url, "judge", cache=judge.cache)
    judge.check()
    assert judge.ask(questions(1), number)[0][0] == 1


def test_nothing_is_asked_twice(serve: Any) -> None:
    server, judge = serve(echo)
    again = pickle.loads(pickle.dumps(judge))
    judge.ask(questions(10), number)
    assert [value for value, _ in again.ask(questions(12), number)] == list(range(12))
    assert len(server.asked) == 12
    assert [value for value, _ in judge.ask([Question("What is 50?")] * 4, number)] == [50.0] * 4
    assert len(server.asked) == 13


def test_another_question_model_or_revision_is_asked(serve: Any) -> None:
    server, judge = serve(lambda asked: Said("1"), ("judge", "judge-2"))
    image = Image.new("RGB", (8, 8), "red")
    settings = {"url": server.url, "model": "judge", "cache": judge.cache}
    for count, (change, question) in enumerate(
        [
            ({}, Question("a", (image,))),
            ({}, Question("b", (image,))),
            ({}, Question("a", (Image.new("RGB", (8, 8), (254, 0, 0)),))),
            ({}, Question("a", (Image.new("RGB", (4, 16), "red"),))),
            ({}, Question("a", (image, image))),
            ({"model": "judge-2"}, Question("a", (image,))),
            ({"revision": "abc"}, Question("a", (image,))),
            ({"temperature": 0.5}, Question("a", (image,))),
        ],
        1,
    ):
        Endpoint(**(settings | change)).ask([question], number)
        assert len(server.asked) == count
    Endpoint(**(settings | {"max_tokens": 5, "concurrency": 1})).ask([Question("a", (image,))], number)
    assert len(server.asked) == count


def test_only_replies_that_parse_are_kept(serve: Any) -> None:
    server, judge = serve(lambda asked: Said("none" if asked.number < 3 else "7"))
    assert judge.ask(questions(1), number)[0][0] is None
    assert judge.ask(questions(1), number)[0][0] == 7
    judge.ask(questions(1), number)
    assert len(server.asked) == 4
    assert judge.ask(questions(1), lambda text: None)[0][0] is None  # what another parser cannot read is asked again
    assert len(server.asked) == 7


def test_cache_is_in_the_users_cache(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    _, judge = serve(lambda asked: Said("1"), cache=None)
    judge.ask(questions(1), number)
    assert (tmp_path / "home" / "gdro" / "judge.sqlite").is_file()


def test_unusable_cache_is_named(serve: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.sqlite"
    bad.write_bytes(b"no database" * 1000)
    _, judge = serve(lambda asked: Said("1"), cache=str(bad))
    with pytest.raises(UserError, match=r"judge cache: .*bad.sqlite cannot be used \(file is not a database\)"):
        judge.ask(questions(1), number)
    _, judge = serve(lambda asked: Said("1"), cache=str(bad / "below a file.sqlite"))
    with pytest.raises(UserError, match=r"judge cache: .*cannot be used"):
        judge.ask(questions(1), number)


def test_half_a_surrogate_pair_does_not_end_the_run(serve: Any) -> None:
    _, judge = serve(lambda asked: Said("5 \ud83d"))
    assert judge.ask(questions(1), lambda text: text) == [("5 ?", Answer("5 ?"))]


def test_works_where_a_loop_is_running(serve: Any) -> None:
    _, judge = serve(echo)

    async def notebook() -> Any:
        return judge.ask(questions(3), number)

    assert [value for value, _ in asyncio.run(notebook())] == [0, 1, 2]


ASK = """
import json, sys
from gdro.rewards.judges.endpoint import Endpoint, Question
url, cache, count = sys.argv[1:]
questions = [Question(f"What is {i}?") for i in range(int(count))]
found = Endpoint(url, "judge", cache=cache, concurrency=4).ask(questions, float)
print(json.dumps([value for value, _ in found]))
"""


@pytest.mark.slow
def test_processes_share_a_cache(serve: Any, tmp_path: Path) -> None:
    server, judge = serve(echo)
    command = [sys.executable, "-c", ASK, server.url, str(judge.cache), "150"]
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: subprocess.run(command, capture_output=True, text=True), range(3)))
    for run in runs:
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout) == list(range(150))
    with sqlite3.connect(str(judge.cache)) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert file.execute("SELECT count(*) FROM replies").fetchone() == (150,)


@pytest.mark.slow
def test_interrupt_ends_it_at_once(serve: Any) -> None:
    server, judge = serve(lambda asked: Said("1", delay=8))
    process = subprocess.Popen(
        [sys.executable, "-c", ASK, server.url, str(judge.cache), "9"], stderr=subprocess.PIPE, text=True
    )
    while not server.asked and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.1)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in stderr
    assert time.monotonic() - start < 6


@pytest.mark.slow
def test_importing_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'httpx'} & set(sys.modules)"
    code = f"import sys; import gdro.rewards.judges.unified; print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.slow
def test_killed_runs_score_every_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 images, a server that fails one request in five, two kills: the benchmark does 10,000 and five."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import judge_client

    result = judge_client.killed(tmp_path, requests=600, kills=2, concurrency=16, timeout=3)
    assert result["kills"] == 2
    assert result["scored"] + result["missing"] == 600
    assert result["missing"] < 60  # one is expected; a busy computer has time-outs of its own
    assert result["wrong"] == 0
    assert 0 < result["kept_at_kills"][0] < result["kept_at_kills"][1] < 600
    assert result["asked_again_though_kept"] == 0
