"""The run directory: its lock, for one process at a time, and the seconds each stage took."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from gdro.common import distributed
from gdro.common.errors import UserError
from gdro.common.files import sweep_below
from gdro.common.reading import cause
from gdro.common.sealed import find_record, write_record

HEARTBEAT_SECONDS = 5.0
FOLDERS = ("prompts", "groups", "rewards", "rounds", "checkpoints", "validation", "adapter", "evaluation")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Lock and sweep the run directory; the system releases the lock when the process ends, however it ends.

    The first of several processes holds it for all. Raises UserError if another run holds it.
    """
    if not distributed.is_first():
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")  # noqa: SIM115 (closed below; held until then)
    except (OSError, ValueError) as error:
        raise UserError(f"--out is {out}: {cause(error)}; expected a writable folder") from None
    with lock:
        try:
            _lock(lock.fileno())
        except OSError:
            raise UserError(f"--out is {out}, which another gdro process is using; expected no other") from None
        sweep_below(out, FOLDERS)
        yield


def _lock(handle: int) -> None:
    """Lock a file while it is open; OSError if another process has locked it. Children do not inherit the lock."""
    try:
        import fcntl
    except ImportError:  # Windows
        msvcrt: Any = import_module("msvcrt")
        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Clock:
    """Wall seconds of each stage in the JSON file `path`, summed over resumptions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._noted: dict[str, float] = find_record(path) or {}
        self._stages: list[str] = []  # stages running; only the innermost one counts
        self._since = 0.0
        self._lock = threading.Lock()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage so far."""
        with self._lock:
            now = dict(self._noted)
            if self._stages:
                now[self._stages[-1]] = now.get(self._stages[-1], 0.0) + time.monotonic() - self._since
        return {stage: round(seconds, 3) for stage, seconds in now.items()}

    @contextmanager
    def running(self, stage: str) -> Iterator[None]:
        """Count the seconds within for `stage`, and not for any stage around it.

        They are also saved now and then, so a kill loses few of them.
        """
        over = threading.Event()

        def beat() -> None:
            while not over.wait(HEARTBEAT_SECONDS):
                self._note()

        self._turn(lambda: self._stages.append(stage))
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._turn(self._stages.pop)
            self._note()

    def _turn(self, change: Callable[[], Any]) -> None:
        """Record the seconds so far, then let another stage count."""
        now = self.seconds
        with self._lock:
            self._noted, self._since = now, time.monotonic()
            change()

    def _note(self) -> None:
        if not distributed.is_first():
            return
        with suppress(UserError):  # the stage itself will report a full disk
            write_record(self.path, self.seconds)
