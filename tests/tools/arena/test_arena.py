"""The human study: blind and balanced, no vote lost or counted twice, and a table that equals a count by hand."""

import http.client
import io
import json
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from studies import PROMPTS, Process, read_color, serving, write_run, write_store

from gdro.common.errors import UserError
from gdro.tools.arena.pairs import Pair, Shown, deal, draw_pairs, open_models
from gdro.tools.arena.server import Server, arena, arena_table
from gdro.tools.arena.table import interval, results
from gdro.tools.arena.votes import QUESTIONS, Study, Vote, Votes

ASKED = list(QUESTIONS)
SECRET = b"secret"


def many_pairs(count: int) -> dict[int, Pair]:
    return {n: Pair(f"p{n}", "x", 0, "one", "two") for n in range(count)}


def shown(number: int) -> Shown:
    return Shown(number, f"t{number}", ("i", "j"), ("one", "two"))


# What is shown


def test_sides_are_balanced_and_drawn_for_each_rater() -> None:
    """1600 fair coins lie within 5 standard deviations (100) of 800, and two raters' coins agree in half."""
    pairs = many_pairs(1600)
    ann, bob = (deal(pairs, rater, seed=0, secret=SECRET) for rater in ("ann", "bob"))
    for split in (ann, bob):
        assert abs(sum(s.models[0] == "one" for s in split) - 800) < 100
        assert sorted(s.number for s in split) == list(range(1600))
    sides = [{s.number: s.models[0] for s in split} for split in (ann, bob)]
    assert abs(sum(sides[0][n] == sides[1][n] for n in range(1600)) - 800) < 100
    assert [s.number for s in ann] != [s.number for s in bob]


def test_sides_do_not_hang_together_with_the_order() -> None:
    split = deal(many_pairs(1600), "ann", seed=0, secret=SECRET)
    assert abs(sum(s.models[0] == "one" for s in split[:800]) - 400) < 71


def test_a_deal_is_a_function_of_seed_and_rater_and_keeps_when_pairs_are_added() -> None:
    few, again, more = (deal(many_pairs(n), "ann", seed=0, secret=SECRET) for n in (50, 50, 80))
    assert few == again
    assert [s for s in more if s.number < 50] == few
    assert [s.models for s in deal(many_pairs(50), "ann", seed=1, secret=SECRET)] != [s.models for s in few]


def test_tokens_are_distinct_and_depend_on_the_secret() -> None:
    split = [s for rater in ("ann", "bob") for s in deal(many_pairs(50), rater, seed=0, secret=SECRET)]
    tokens = [t for s in split for t in (s.token, *s.images)]
    assert len(set(tokens)) == len(tokens) == 300
    other = deal(many_pairs(50), "ann", seed=0, secret=b"other")
    assert not {t for s in other for t in (s.token, *s.images)} & set(tokens)


def test_one_run_is_base_against_tuned_and_several_are_their_tuned_models(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a" / "seed-0", 0, 1), write_run(tmp_path / "b" / "seed-0", 0, 2)
    assert [m.name for m in open_models([one])] == ["base", "tuned"]
    models = open_models([one, two, one / "evaluation" / "base"])
    assert [m.name for m in models] == ["a/seed-0", "b/seed-0", "evaluation/base"]
    assert [read_color(m.store.images("p1")[1].getpixel((0, 0)))[0] for m in models] == [1, 2, 0]


def test_every_beginning_of_the_pairs_is_balanced(tmp_path: Path) -> None:
    """Three models, six prompts of two images: 36 pairs; 6 meet every prompt, 18 every prompt and rivals once."""
    models = open_models([write_store(tmp_path / name, i) for i, name in enumerate("abc")])
    pairs = draw_pairs(models, 36, seed=0)
    assert len(set(pairs)) == 36
    assert Counter((p.first, p.second) for p in pairs[:6]) == {("a", "b"): 2, ("a", "c"): 2, ("b", "c"): 2}
    assert {p.group for p in pairs[:6]} == {f"p{i}" for i in range(6)}
    assert len({(p.group, p.first, p.second) for p in pairs[:18]}) == 18
    assert draw_pairs(models, None, seed=0) == pairs[:18]
    for count in (0, 37):
        with pytest.raises(UserError, match=f"--pairs is {count}; expected 1 to 36"):
            draw_pairs(models, count, seed=0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 8}, r'"p0" from the seeds \[8, 8\].*expected the same seeds'),
        ({"images": 3}, 'has 3 images of prompt "p0"'),
        ({"width": 32}, 'images of 32x32 of prompt "p0"'),
        ({"prompts": PROMPTS[:5]}, 'has no prompt "p5"'),
        ({"prompts": (*PROMPTS[:5], "a red cup")}, 'another prompt "p5"'),
    ],
)
def test_images_that_do_not_compare_are_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    stores = [write_store(tmp_path / "a", 0), write_store(tmp_path / "b", 1, **other)]
    with pytest.raises(UserError, match=message):
        open_models(stores)


def test_unfinished_runs_single_stores_and_repetitions_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="names a folder twice"):
        open_models([run, tmp_path / "x" / ".." / "run"])
    with pytest.raises(UserError, match="is one store of groups"):
        open_models([run / "evaluation" / "tuned"])
    (run / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"neither evaluation\.json nor"):
        open_models([run])


# Votes


def begun(folder: Path, pairs: int = 4, seed: int = 0, digest: str = "d") -> Votes:
    folder.mkdir(exist_ok=True)
    votes = Votes(folder, begin=True)
    votes.begin({"one": "d", "two": digest}, list(many_pairs(pairs).values()), seed)
    return votes


def test_a_vote_counts_once_and_another_choice_takes_an_undo(tmp_path: Path) -> None:
    votes = begun(tmp_path)
    assert votes.record("ann", shown(0), ASKED[0], "a")
    assert votes.record("ann", shown(0), ASKED[0], "a")
    assert not votes.record("ann", shown(0), ASKED[0], "tie")
    assert votes.record("bob", shown(0), ASKED[0], "tie")
    assert votes.all("ann") == [Vote("ann", 0, ASKED[0], "one", "two", "a")]
    assert [vote.winner for vote in votes.all()] == ["one", None]
    assert votes.undo("ann", 0, ASKED[0])
    assert votes.record("ann", shown(0), ASKED[0], "b")
    assert [vote.winner for vote in votes.all()] == [None, "two"]


def test_undo_takes_the_last_vote_of_its_rater_only(tmp_path: Path) -> None:
    votes = begun(tmp_path)
    for rater, question in (("ann", ASKED[0]), ("ann", ASKED[1]), ("bob", ASKED[0])):
        votes.record(rater, shown(1), question, "a")
    assert not votes.undo("ann", 1, ASKED[0])
    assert votes.undo("ann", 1, ASKED[1])
    assert not votes.undo("ann", 1, ASKED[1])
    assert [(v.rater, v.question) for v in votes.all()] == [("ann", ASKED[0]), ("bob", ASKED[0])]


def test_a_vote_is_on_disk_when_record_returns(tmp_path: Path) -> None:
    """Read by a stranger's connection, from copies of the files as a power cut would leave them."""
    votes = begun(tmp_path / "study")
    votes.record("ann", shown(2), ASKED[2], "tie")
    (tmp_path / "copy").mkdir()
    for path in (tmp_path / "study").glob("arena.sqlite*"):
        if not path.name.endswith("-shm"):
            (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    rows = sqlite3.connect(tmp_path / "copy" / "arena.sqlite").execute("SELECT rater, pair, choice FROM votes")
    assert rows.fetchall() == [("ann", 2, "tie")]


def test_a_study_goes_on_and_may_grow_but_not_change(tmp_path: Path) -> None:
    votes = begun(tmp_path)
    votes.record("ann", shown(3), ASKED[0], "b")
    before = votes.study()
    votes.close()
    votes = begun(tmp_path, pairs=6)
    after = votes.study()
    assert before is not None
    assert after == replace(before, pairs=many_pairs(6))
    assert len(votes.all()) == 1
    votes.close()
    for change, message in (
        ({"pairs": 5}, "--pairs is 5"),
        ({"pairs": 6, "seed": 1}, "--seed is 1"),
        ({"pairs": 6, "digest": "e"}, "other images of two"),
    ):
        with pytest.raises(UserError, match=message):
            begun(tmp_path, **change)


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no arena\.sqlite"):
        arena_table(tmp_path)
    (tmp_path / "arena.sqlite").write_bytes(b"not a database, and longer than the header of one" * 9)
    with pytest.raises(UserError, match="file is not a database"):
        arena_table(tmp_path)
    (tmp_path / "other").mkdir()
    sqlite3.connect(tmp_path / "other" / "arena.sqlite").execute("CREATE TABLE x (y)")
    with pytest.raises(UserError, match="has format 0"):
        Votes(tmp_path / "other", begin=True)


# The table


def test_the_table_equals_a_count_by_hand() -> None:
    """Two raters, prompts p0..p3. Text accuracy, A v B: A, A, tie, B, A, tie: 50.0, 33.3, 16.7 %; A v C: C, C."""
    pairs = {n: Pair(f"p{n % 4}", f"x{n % 4}", 0, "A", "C" if n >= 4 else "B") for n in range(6)}
    given = [(0, "a"), (0, "a"), (1, "tie"), (1, "b"), (2, "a"), (3, "tie"), (4, "b"), (5, "b")]
    votes = [Vote(f"r{i % 2}", n, ASKED[0], pairs[n].first, pairs[n].second, c) for i, (n, c) in enumerate(given)]
    votes.append(Vote("r0", 0, ASKED[2], "B", "A", "a"))  # the other way round: B won
    text = results(Study(["A", "B", "C"], pairs, 0, SECRET), votes)
    rows = [
        [cell.split(" [")[0].strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    assert rows[2:6] == [
        ["A", "37.5", "–", "0.0"],
        ["B", "16.7", "–", "100.0"],
        ["C", "100.0", "–", "–"],
        ["tie", "25.0", "–", "0.0"],
    ]
    assert [ASKED[0], "A", "B", "50.0", "33.3", "16.7", "6"] in rows
    assert [ASKED[0], "A", "C", "0.0", "0.0", "100.0", "2"] in rows
    assert [ASKED[0], "B", "C", "–", "–", "–", "0"] in rows
    assert [ASKED[2], "A", "B", "0.0", "0.0", "100.0", "1"] in rows
    assert text.startswith("9 answers of 2 raters on 6 of 6 pairs of images, 4 distinct prompts")
    assert "[" in text.partition("[95 % interval]")[0]
    alike = {n: replace(pair, prompt=("a sign", "A  Sign")[n % 2]) for n, pair in pairs.items()}
    one = results(Study(["A", "B", "C"], alike, 0, SECRET), votes)
    assert one.startswith("9 answers of 2 raters on 6 of 6 pairs of images, 1 distinct prompt")
    assert "[" not in one.partition("[95 % interval]")[0]  # one text says nothing of others, however often
    assert "Image A, on a side drawn at random, won 57.1" in text  # A of A v B three times and once B: 4 of 7


def test_the_interval_is_wilson_s_where_nothing_was_won() -> None:
    """0 of n: 0 to z^2 / (n + z^2), n the prompts, however many answers each has."""
    for each in (1, 5):
        low, high = interval(np.zeros(20, int), np.full(20, each))
        assert low == 0
        assert high == pytest.approx(1.959964**2 / (20 + 1.959964**2))
    assert np.isnan(interval(np.array([1, 0]), np.array([3, 0]))).all()  # one prompt says nothing of prompts


def test_answers_that_agree_within_a_prompt_count_once() -> None:
    wins = np.array([1, 0, 0, 1, 0, 0, 0, 1])
    assert interval(5 * wins, np.full(8, 5)) == pytest.approx(interval(wins, np.ones(8)))
    spread = np.array([2, 2, 1, 2, 2, 2, 2, 2])  # 15 of 40 again, now without agreement
    assert np.ptp(interval(spread, np.full(8, 5))) < 0.8 * np.ptp(interval(5 * wins, np.full(8, 5)))


def test_the_interval_covers_small_shares_of_correlated_answers() -> None:
    """Five answers a prompt, correlation 0.3, true share 5 %: at least 90 % of 300 studies of 40 prompts."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        wins = rng.binomial(5, rng.beta(0.05 * (1 / 0.3 - 1), 0.95 * (1 / 0.3 - 1), 40))
        low, high = interval(wins, np.full(40, 5))
        covered += low <= 0.05 <= high
    assert covered >= 270


# The server


class Client:
    def __init__(self, server: Server) -> None:
        self.address = server.server_address[0], server.server_address[1]

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection(str(self.address[0]), self.address[1], timeout=20)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        answer = response.status, response.headers, response.read()
        connection.close()
        return answer

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        status, _, content = self.ask("POST", path, body)
        return status, json.loads(content)


@pytest.fixture
def study(tmp_path: Path) -> Iterator[tuple[Client, Votes, Path]]:
    runs = [write_run(tmp_path / f"telltale-run-{name}", 0, model) for name, model in (("a", 1), ("b", 2))]
    with serving(runs, tmp_path / "out") as (server, votes):
        yield Client(server), votes, tmp_path / "out"


def test_nothing_that_is_served_tells_the_models(study: tuple[Client, Votes, Path]) -> None:
    client, _, _ = study
    served = [client.ask("GET", "/")]
    state: dict[str, Any] = client.post("/state", rater="ann")[1]
    while state["pair"]:
        served += [client.ask("GET", url) for url in state["images"]]
        for question in ASKED:
            body = {"rater": "ann", "pair": state["pair"], "question": question, "choice": "tie"}
            served.append(client.ask("POST", "/vote", body))
            state = json.loads(served[-1][2])
    assert len(served) == 1 + 6 * (2 + 3)
    for status, headers, content in served:
        assert status == 200
        assert headers["Cache-Control"] == "no-store"
        everything = str(headers).encode() + content
        for telltale in (b"telltale", b"tuned", b"evaluation"):
            assert telltale not in everything


def test_images_are_those_of_the_models_that_the_vote_names(study: tuple[Client, Votes, Path]) -> None:
    client, votes, out = study
    order = ["telltale-run-a", "telltale-run-b"]
    state = client.post("/state", rater="ann")[1]
    pixels = []
    for url in state["images"]:
        image = Image.open(io.BytesIO(client.ask("GET", url)[2]))
        assert (image.info, image.size) == ({}, (64, 32))
        pixels.append(read_color(image.getpixel((5, 5))))
    client.post("/vote", rater="ann", pair=state["pair"], question=ASKED[0], choice="a")
    vote = votes.all()[0]
    assert [order[model - 1] for model, _, _ in pixels] == [vote.a, vote.b]
    row = sqlite3.connect(out / "arena.sqlite").execute(
        "SELECT group_id, image, prompt FROM pairs WHERE pair = ?", (vote.pair,)
    )
    assert row.fetchone() == (f"p{pixels[0][1]}", pixels[0][2], state["prompt"])
    assert pixels[0][1:] == pixels[1][1:]


def test_a_vote_sent_twice_is_one_and_a_late_one_changes_nothing(study: tuple[Client, Votes, Path]) -> None:
    client, votes, _ = study
    pair = client.post("/state", rater="ann")[1]["pair"]
    body = {"rater": "ann", "pair": pair, "question": ASKED[0]}
    first = client.post("/vote", **body, choice="a")
    assert first == client.post("/vote", **body, choice="a")
    assert client.post("/vote", **body, choice="b") == (409, first[1])
    assert (len(votes.all()), votes.all()[0].choice) == (1, "a")
    assert client.post("/undo", **body)[1]["answers"] == {}
    assert client.post("/undo", **body)[0] == 409
    assert votes.all() == []


def test_undo_goes_back_to_the_pair_before(study: tuple[Client, Votes, Path]) -> None:
    client, _, _ = study
    state = client.post("/state", rater="ann")[1]
    first = state["pair"]
    for question in ASKED:
        state = client.post("/vote", rater="ann", pair=first, question=question, choice="b")[1]
    assert (state["done"], state["pair"] != first) == (1, True)
    state = client.post("/undo", rater="ann", **state["last"])[1]
    assert (state["done"], state["pair"], state["answers"]) == (0, first, dict.fromkeys(ASKED[:2], "b"))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8765"}, 403),
        ({"Host": "192.168.0.7:8765"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "[::1"}, 400),
        ({"Origin": "http://["}, 400),
        ({"Origin": "http://localhost:1", "Host": "localhost:8765"}, 403),
        ({"Origin": "http://localhost:8765", "Host": "localhost:8765"}, 200),
        ({"Host": "[::1]:8765"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_other_sites_cannot_vote(study: tuple[Client, Votes, Path], headers: dict[str, str], status: int) -> None:
    client, votes, _ = study
    pair = client.post("/state", rater="ann")[1]["pair"]
    body = {"rater": "ann", "pair": pair, "question": ASKED[0], "choice": "a"}
    assert client.ask("POST", "/vote", body, headers)[0] == status
    assert len(votes.all()) == (status == 200)


def test_requests_that_make_no_sense_are_refused(study: tuple[Client, Votes, Path]) -> None:
    client, votes, _ = study
    pair = client.post("/state", rater="ann")[1]["pair"]
    good = {"rater": "ann", "pair": pair, "question": ASKED[0], "choice": "a"}
    for change, status in (
        ({"choice": "c"}, 400),
        ({"question": "style"}, 400),
        ({"rater": " "}, 400),
        ({"rater": "x" * 65}, 400),
        ({"rater": "a\u202eb"}, 400),
        ({"rater": 3}, 400),
        ({"more": "x"}, 400),
        ({"pair": "0" * 32}, 404),
        ({"rater": "bob"}, 404),  # the token is ann's
        ({"pair": "x" * 5000}, 413),
    ):
        assert client.post("/vote", **(good | change))[0] == status
    assert client.ask("POST", "/vote", b"{")[0] == 400
    assert client.ask("POST", "/vote", b"[]")[0] == 400
    assert client.ask("POST", "/state", b"{}", {"Content-Length": "x"})[0] == 411
    assert client.ask("POST", "/elsewhere", good)[0] == 404
    assert client.ask("GET", "/image/../arena.sqlite")[0] == 404
    assert client.ask("GET", "/vote")[0] == 404
    assert votes.all() == []


def test_a_database_that_fails_is_told_and_the_vote_can_be_sent_again(
    study: tuple[Client, Votes, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    client, votes, out = study
    pair = client.post("/state", rater="ann")[1]["pair"]
    body = {"rater": "ann", "pair": pair, "question": ASKED[0], "choice": "a"}
    other = sqlite3.connect(out / "arena.sqlite", isolation_level=None)
    other.execute("ALTER TABLE votes RENAME TO away")
    assert client.post("/vote", **body)[0] == 503
    assert "no such table: votes" in capsys.readouterr().err
    other.execute("ALTER TABLE away RENAME TO votes")
    assert client.post("/vote", **body)[0] == 200
    assert len(votes.all()) == 1


def test_raters_at_once_lose_nothing(study: tuple[Client, Votes, Path]) -> None:
    client, votes, _ = study

    def rate(rater: str) -> None:
        state = client.post("/state", rater=rater)[1]
        while state["pair"]:
            question = next(q for q in ASKED if q not in state["answers"])
            state = client.post("/vote", rater=rater, pair=state["pair"], question=question, choice="a")[1]

    threads = [threading.Thread(target=rate, args=(f"rater {n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(vote.rater for vote in votes.all()) == {f"rater {n}": 6 * 3 for n in range(6)}


@pytest.mark.slow
def test_ctrl_c_ends_it_and_prints_the_table(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    process = Process([run], out, rater="ann", pairs=3)
    try:
        with pytest.raises(UserError, match="another gdro process"):
            arena([run], out, port=0)
        port = int(process.url.rsplit(":", 1)[1].strip("/"))
        with pytest.raises(UserError, match=f"--port {port}: Address already in use"):
            arena([run], tmp_path / "other", port=port)
        assert arena_table(out) == "no votes yet"
    finally:
        stdout, stderr = process.stop(signal.SIGINT)
    assert (process.process.returncode, stdout, stderr.strip()) == (0, "no votes yet\n", "")
    with pytest.raises(UserError, match="--pairs is 2"):
        arena([run], out, port=0, pairs=2)
    with pytest.raises(UserError, match=r"--rater is ''"):
        arena([run], out, rater="")
    with pytest.raises(UserError, match="--port is 70000"):
        arena([run], out, port=70000)
