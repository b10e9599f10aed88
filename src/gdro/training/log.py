"""A run's records: `metrics.jsonl`, optionally tensorboard, and the alarm."""

import errno
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gdro.common import distributed
from gdro.common.errors import UserError
from gdro.common.files import write_bytes
from gdro.common.progress import say
from gdro.common.reading import parse_json, read_text
from gdro.common.sealed import DIGEST, row_digest


def require_trackers(report_to: Sequence[str]) -> None:
    """Raise UserError if a tracker's package is missing."""
    if "tensorboard" in report_to:
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            raise UserError(
                'train.report_to: "tensorboard" needs the package tensorboard; pip install "gdro[tensorboard]"'
            ) from None


LOG = "metrics.jsonl"


class MetricsLog:
    """Appends one JSON object per line to `path`, after cutting off what a resumed run will write again.

    Rows of steps after `resumed` are dropped (all if it is None), and so is a last line cut short by a kill; the
    attribute `rows` counts what is there. Raises UserError for any other line that was altered, and if the number of
    rows kept is not the argument `rows`, if given. Only the first of several processes writes.
    """

    def __init__(
        self, path: Path, *, resumed: int | None, rows: int | None = None, report_to: Sequence[str] = ()
    ) -> None:
        first, kept = distributed.is_first(), []
        if first:
            kept = [] if resumed is None else _rows_until(path, resumed, rows)
            write_bytes(path, "".join(kept).encode())
        self.rows = len(kept)
        self._file = open(path if first else os.devnull, "ab", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self._tensorboard: Any = None
        if first and "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if resumed is None else resumed + 1
            self._tensorboard = SummaryWriter(str(path.parent / "tensorboard"), purge_step=purge)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def write(self, step: int, values: Mapping[str, Any], under: str | None = None) -> None:
        """Append {"step", **values}, or {"step", under: {...}}."""
        row = {"step": step, **({under: dict(values)} if under else values)}
        self.rows += 1
        data = (json.dumps(row | {DIGEST: row_digest(row)}) + "\n").encode()
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(f"{self._file.name} could not be written: {error.strerror}") from error
        if self._tensorboard is not None:
            for name, value in _scalars(under or "train", values):
                self._tensorboard.add_scalar(name, value, step)

    def sync(self) -> None:
        """Force the rows to disk; called before a checkpoint, so no checkpoint has a step the log lacks."""
        os.fsync(self._file.fileno())


def _scalars(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(f"{prefix}/{name}", value)
        else:
            yield f"{prefix}/{name}", float(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, without a last one cut short by a kill; empty if there is no file.

    Raises UserError for a row that was altered or is missing.
    """
    return [row for row, _ in _rows(path)] if path.exists() else []


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every row and its line."""
    lines = read_text(path, "a training log").split("\n")
    step: int | None = None
    for number, line in enumerate(lines[:-1], 1):  # anything after the last newline is a row cut short
        row = parse_json(line, f"{path}:{number} is damaged: it")
        if not isinstance(row, dict) or row.pop(DIGEST, None) != row_digest(row):
            raise UserError(f"{path}:{number} is damaged; expected a row as gdro wrote it")
        if "validation" not in row:
            if step is not None and row["step"] != step + 1:
                raise UserError(
                    f"{path}:{number} is of step {row['step']}, the row before of {step}; expected the next"
                )
            step = row["step"]
        yield row, line + "\n"


def _rows_until(path: Path, step: int, rows: int | None) -> list[str]:
    kept = [line for row, line in _rows(path) if row["step"] <= step] if path.exists() else []
    if rows not in (None, len(kept)):
        raise UserError(
            f"{path} is damaged or missing: it holds {len(kept)} rows up to step {step}, not {rows}; "
            "expected the whole file, or train.resume_from_checkpoint with another --out"
        )
    return kept


class DriftAlarm:
    """Watches whether the best images become less likely, the sign that ranking improves at the cost of quality.

    On if, over the last WINDOW steps, their mean velocity error exceeds the reference's by more than the share
    `threshold`. Reports on stderr when it turns on and when it turns off.
    """

    WINDOW = 20

    def __init__(self, threshold: float, window: Sequence[Sequence[float]] = (), on: bool = False) -> None:
        self.threshold, self.on = threshold, on
        self.window = deque((tuple(pair) for pair in window), maxlen=self.WINDOW)

    @classmethod
    def state(cls, memory: Mapping[str, Any], step: int) -> dict[str, Any] | None:
        """The alarm in a checkpoint's memory, for the verdict: `step`, whether it is `on`, and `excess`, the share by
        which the error exceeds the reference's; None for objectives without a best image."""
        if not memory["window"]:
            return None
        drift, reference = (sum(values) for values in zip(*memory["window"], strict=True))
        return {"step": step, "on": memory["on"], "excess": drift / reference}

    def update(self, step: int, drift_best: float, error_best: float) -> bool:
        """Record a step's mean d - d_ref and mean d of the best images; True while the alarm is on."""
        self.window.append((drift_best, error_best - drift_best))
        drift, reference = (sum(values) for values in zip(*self.window, strict=True))
        was, self.on = self.on, len(self.window) == self.WINDOW and drift > self.threshold * reference
        if self.on and not was:
            say(
                f"ALARM step {step}: over {self.WINDOW} steps the velocity error of the best images is "
                f"{100 * drift / reference:.1f} % above the reference's, so they are becoming less likely; "
                "if the verdict finds the images worse, raise train.gamma or train.beta"
            )
        elif was and not self.on:
            say(f"alarm off at step {step}: the best images' likelihood has recovered")
        return self.on
