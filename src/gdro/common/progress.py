"""Progress, rate and time left: a bar on a terminal, plain lines in a log.

Both go to stderr, from the first of several processes only. The rate counts only this session's work, so it stays
correct after resuming.
"""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tqdm import tqdm

from gdro.common import distributed
from gdro.common.terminal import printable, tell

LINE_EVERY_SECONDS = 10.0
LINE_EVERY_SHARE = 0.1
LINE_AT_MOST_SECONDS = 1.0


def say(line: str) -> None:
    """Print a line on stderr, once for all processes."""
    if distributed.is_first():
        tell(line)


class Progress:
    """`with Progress("sample", 512, "img", done=128) as progress: progress.advance(8, reward=0.6)`.

    `total` and `done` count `unit`s of the whole job; `done` is what earlier sessions finished. The `values` given to
    `advance` are the latest metrics, shown beside the rate.
    """

    def __init__(self, label: str, total: int, unit: str = "it", done: int = 0) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._at_start = self._at_line = done
        self._values: dict[str, float] = {}
        self._bar: tqdm | None = None

    def __enter__(self) -> Self:
        self._start = self._line_time = time.monotonic()
        if sys.stderr.isatty() and distributed.is_first():
            self._bar = tqdm(
                desc=printable(self.label),
                total=self.total,
                initial=self.done,
                unit=self.unit,
                dynamic_ncols=True,
                leave=True,
            )
        elif self.done:
            say(f"{self.label}: {self.done}/{self.total} {self.unit} done earlier, resuming")
        return self

    def advance(self, n: int = 1, **values: float) -> None:
        """Count `n` more units as done."""
        self.done += n
        self._values |= values
        if self._bar is not None:
            if values:
                self._bar.set_postfix({k: f"{v:.4g}" for k, v in self._values.items()}, refresh=False)
            self._bar.update(n)
            return
        now = time.monotonic()
        waited = now - self._line_time
        further = self.done - self._at_line >= LINE_EVERY_SHARE * self.total and waited >= LINE_AT_MOST_SECONDS
        if waited >= LINE_EVERY_SECONDS or further or self.done >= self.total:
            self._line_time, self._at_line = now, self.done
            say(self._line(now))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self, now: float) -> str:
        elapsed = max(now - self._start, 1e-9)
        rate = (self.done - self._at_start) / elapsed
        left = duration((self.total - self.done) / rate) if rate > 0 else "unknown"
        shown = f"{rate:.1f} {self.unit}/s" if rate >= 1 or rate == 0 else f"{1 / rate:.1f} s/{self.unit}"
        share = 100 * self.done / self.total if self.total else 100.0
        values = "".join(f", {k} {v:.4g}" for k, v in self._values.items())
        return f"{self.label}: {self.done}/{self.total} {self.unit} ({share:.0f} %), {shown}, {left} left{values}"


def interval(ends: Sequence[float | None], digits: int = 3) -> str:
    """Both ends of an interval with their signs; a dash if there is none (a single prompt)."""
    low, high = ends
    return "–" if low is None or high is None else f"{low:+.{digits}f} to {high:+.{digits}f}"


def duration(seconds: float) -> str:
    """`47 s`, `3 min 05 s` or `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
