"""Progress tells rate and time left, and counts only this session's work."""

import io
import time
from itertools import count

import pytest

from gdro.common.progress import Progress, duration


def ticking(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every look at the clock finds it `seconds` later."""
    clock = count(100.0, seconds)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))


def test_log_lines_carry_count_rate_time_left_and_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticking(monkeypatch, 2.0)
    with Progress("train", 20, "step") as progress:
        for _ in range(20):
            progress.advance(loss=0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10  # one per 10 %
    assert lines[0] == "train: 2/20 step (10 %), 2.0 s/step, 36 s left, loss 0.5"
    assert lines[-1] == "train: 20/20 step (100 %), 2.0 s/step, 0 s left, loss 0.5"


def test_slow_work_has_a_line_every_ten_seconds_and_fast_work_only_the_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, lines in ((10.0, 20), (0.01, 1)):
        ticking(monkeypatch, seconds)
        with Progress("train", 20, "step") as progress:
            for _ in range(20):
                progress.advance()
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_rate_after_resumption_counts_only_new_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticking(monkeypatch, 10.0)
    with Progress("sample", 1000, "img", done=900) as progress:
        progress.advance(20)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sample: 900/1000 img done earlier, resuming"
    assert lines[1] == "sample: 920/1000 img (92 %), 2.0 img/s, 40 s left"  # 20 in 10 s, not 920


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress("sample", 4, "img") as progress:
        progress.advance(4, reward=1.0)
    assert "\r" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()


def test_durations() -> None:
    assert [duration(s) for s in (46.6, 185, 7620)] == ["47 s", "3 min 05 s", "2 h 07 min"]
