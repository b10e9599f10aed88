"""Printed text: nothing from outside steers the terminal, and every stream can take it."""

import io
import sys

import pytest

from gdro.cli import main
from gdro.common.progress import Progress, say
from gdro.common.terminal import printable, put

HOSTILE = "a\x1b[2Jb\x9b31mc\rd\x07e\u202ef\u2028g\ud800h\x7f"
SHOWN = r"a\x1b[2Jb\x9b31mc\rd\x07e\u202ef\u2028g\ud800h\x7f"


def test_what_steers_a_terminal_stands_as_an_escape() -> None:
    assert printable(HOSTILE) == SHOWN
    fine = 'line\n\ttab, "quotes", – ± é 招 👩‍🚀 \u3000 \xa0 \\x1b'
    assert printable(fine) == fine


def test_errors_notes_and_progress_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([HOSTILE]) == 2
    say(f"note: {HOSTILE}")
    with Progress(f"score {HOSTILE}", 1) as progress:
        progress.advance()
    err = capsys.readouterr().err
    assert err.count("a\\x1b[2Jb") == err.count("\n") == 3
    assert printable(err) == err


def test_a_bar_is_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress(HOSTILE, 1) as progress:
        progress.advance()
    assert SHOWN in terminal.getvalue()


def test_a_stream_of_few_characters_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.setattr(sys, "stdout", stream)
    put("1.5 – 2.0\n招")
    assert stream.buffer.getvalue() == b"1.5 \\u2013 2.0\n\\u62db\n"
