"""The run directory as such: one process at a time, and the seconds each stage took."""

import fcntl
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gdro.errors import UserError
from gdro.files import write_json

HEARTBEAT_SECONDS = 5.0


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the run directory; the system lets go of it when the process ends, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")  # noqa: SIM115 (closed below; held until then)
    except OSError as error:
        raise UserError(f"--out is {out}: {error.strerror}; expected a folder that can be written") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--out is {out}, where another gdro process is at work; expected to be alone") from None
        yield


class Clock:
    """Wall seconds of each stage in the JSON file `path`, added up over resumptions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = read_json(path) or {}

    @contextmanager
    def running(self, stage: str) -> Iterator[None]:
        """Count the seconds inside for `stage`; noted now and then too, so that a kill loses few of them."""
        before, start, over = self.seconds.get(stage, 0.0), time.monotonic(), threading.Event()

        def note() -> None:
            self.seconds[stage] = round(before + time.monotonic() - start, 3)
            with suppress(UserError):  # a full disk will be told of by the stage itself
                write_json(self.path, self.seconds)

        def beat() -> None:
            while not over.wait(HEARTBEAT_SECONDS):
                note()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            note()


def read_json(path: Path) -> Any:
    """What a JSON file of the run holds, None without the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path} is damaged; expected JSON written by gdro (delete it to make it again)") from None
