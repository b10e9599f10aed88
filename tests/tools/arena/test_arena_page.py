"""The page in a real browser, by its keyboard: what is seen is what is voted on, and nothing pressed is lost."""

import signal
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from studies import PROMPTS, Process, read_color, serving, write_run

from gdro.tools.arena.votes import QUESTIONS

pytestmark = pytest.mark.slow

ASKED = list(QUESTIONS)
READY = "!busy && (shown || !document.querySelector('#end').hidden)"
PIXEL = """[...document.querySelectorAll('.frame img')].map((image) => {
  const canvas = document.createElement('canvas');
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
  return [...context.getImageData(5, 5, 1, 1).data];
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("chromium") / "profile")
    yield opened
    opened.close()


class Rater:
    """Presses keys, and notes by the pixels on the screen which model every key stands for."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.votes: dict[tuple[int, str], str] = {}  # (prompt, question) -> base, tuned or tie
        self.prompts: list[int] = []

    def look(self) -> tuple[int, list[str]]:
        """(prompt, models) on the screen, A's first; text, prompt and images belong together."""
        (a, group, index), (b, other, index_b) = (read_color(pixel) for pixel in self.browser.run(PIXEL))
        assert (group, index) == (other, index_b)
        assert self.browser.run("document.querySelector('#prompt').textContent") == PROMPTS[group]
        return group, [["base", "tuned"][model] for model in (a, b)]

    def question(self) -> str:
        named: str = self.browser.run("document.activeElement.dataset.question")
        return named

    def press(self, *keys: str) -> None:
        """Answer the open question with the last of the keys."""
        group, (a, b) = self.look()
        if group not in self.prompts:
            self.prompts.append(group)
        meant = {"1": a, "ArrowLeft": a, "2": "tie", "3": b, "ArrowRight": b, "Enter": a}[keys[-1]]
        self.votes[group, self.question()] = meant
        for key in keys:
            self.browser.press(key)
        self.browser.wait(READY)


def stored(out: Path) -> list[tuple[Any, ...]]:
    query = "SELECT group_id, question, choice, a, b, rater FROM votes JOIN pairs USING (pair) ORDER BY vote"
    database = sqlite3.connect(out / "arena.sqlite")
    rows = database.execute(query).fetchall()
    database.close()
    return rows


def unblinded(out: Path) -> dict[tuple[int, str], str]:
    rows = stored(out)
    assert {row[5] for row in rows} == {"Änn <b>"}
    found = {(int(group[1:]), question): {"a": a, "b": b, "tie": "tie"}[c] for group, question, c, a, b, _ in rows}
    assert len(found) == len(rows)
    return found


def test_a_study_by_keyboard_through_reload_and_crash(browser: Browser, tmp_path: Path) -> None:
    """Every vote of the database is the model that was on the screen under the key pressed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    runs, out = [write_run(tmp_path / "run")], tmp_path / "out"
    process = Process(runs, out, port=port)
    try:
        browser.look(1280, 800)
        browser.open(process.url)
        browser.type("Änn <b>")
        browser.press("Enter")
        browser.wait(READY)
        rater = Rater(browser)

        rater.press("1")
        rater.press("2")
        assert rater.question() == ASKED[2]
        assert unblinded(out) == rater.votes

        browser.open(process.url)  # a reload: same rater, same pair, same question
        browser.wait(READY)
        assert rater.look()[0] == rater.prompts[0]
        assert rater.question() == ASKED[2]
        assert browser.run("document.querySelectorAll('[aria-pressed=true]').length") == 2
        rater.press("ArrowRight")
        assert browser.run("document.querySelector('#count').textContent") == "Pair 2 of 6"

        browser.press("Backspace")  # back over the border between two pairs, and another answer
        browser.wait(READY)
        assert rater.look()[0] == rater.prompts[0]
        rater.press("1")
        assert unblinded(out) == rater.votes

        rater.press("Tab", "Enter")  # the first button of the open question
        browser.press("Tab")
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert browser.run("document.activeElement.ariaLabel") == "A is better"
        browser.send("Input.dispatchKeyEvent", type="rawKeyDown", key="1", code="Digit1", autoRepeat=True)
        browser.send("Input.dispatchKeyEvent", type="rawKeyDown", key="1", code="Digit1", modifiers=2)  # Ctrl
        browser.run("document.querySelector('.question.now').focus()")
        rater.press("3")
        assert unblinded(out) == rater.votes

        assert browser.complaints == []
        process.stop(signal.SIGKILL)
        group, (_, b) = rater.look()
        rater.votes[group, rater.question()] = b
        browser.press("3")
        browser.wait("document.querySelector('#problem').textContent.startsWith('Not saved yet')")
        process = Process(runs, out, port=port)
        browser.wait(READY)
        assert browser.run("document.querySelector('#problem').textContent") == ""
        assert unblinded(out) == rater.votes
        assert all("ERR_CONNECTION_REFUSED" in complaint for complaint in browser.complaints)
        browser.complaints.clear()

        keys = ["1", "2", "3", "ArrowLeft", "ArrowRight"]
        while browser.run("!document.querySelector('#pair').hidden"):
            group, _ = rater.look()
            expected = "rtl" if group in (2, 3) else "ltr"
            assert browser.run("getComputedStyle(document.querySelector('#prompt')).direction") == expected
            assert browser.run("document.querySelector('#prompt').childElementCount") == 0
            said = browser.run("document.querySelector('#said').textContent")
            assert rater.question() in said
            rater.press(keys[len(rater.votes) % 5])
        assert browser.run("document.title") == "Which image is better?"
        assert "all 6 pairs" in browser.run("document.querySelector('#thanks').textContent")
        assert sorted(rater.prompts) == list(range(6))
        assert len(rater.votes) == 18
        assert unblinded(out) == rater.votes
        assert browser.complaints == []
    finally:
        stdout, _ = process.stop(signal.SIGINT)
    assert stdout.startswith("18 answers of 1 rater on 6 of 6 pairs of images, 6 distinct prompts")


@pytest.mark.parametrize(
    ("width", "height", "touch"), [(1280, 800, False), (390, 844, True), (320, 568, True), (844, 390, True)]
)
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_the_window(
    browser: Browser, tmp_path: Path, width: int, height: int, touch: bool, dark: bool
) -> None:
    """No sideways scrolling; the open question's buttons are in sight and large enough to touch."""
    prompts = ("x" * 150, PROMPTS[1], PROMPTS[2] * 20)
    with serving([write_run(tmp_path / "run", prompts=prompts)], tmp_path / "out", "Bob") as (server, votes):
        browser.look(width, height, dark=dark, touch=touch)
        browser.open(server.url)
        for count in range(len(prompts)):
            browser.wait(READY)
            assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
            boxes = browser.run(
                "[...document.querySelectorAll('.question.now button')].map((b) => b.getBoundingClientRect().toJSON())"
            )
            for box in boxes:
                assert box["height"] >= 44
                assert 0 <= box["left"] < box["right"] <= width
                assert 0 <= box["top"] < box["bottom"] <= height
            shade = browser.run("getComputedStyle(document.body).backgroundColor")
            assert (shade == "rgb(19, 20, 23)") == dark
            for choice in (0, 1, 2):  # by pointer this time
                browser.run(f"document.querySelectorAll('.question.now button')[{choice}].click()")
                browser.wait(READY)
            assert len(votes.all("Bob")) == 3 * (count + 1)
        assert browser.run("[...document.querySelectorAll('.leave')].every((button) => button.hidden)")
    assert browser.complaints == []
