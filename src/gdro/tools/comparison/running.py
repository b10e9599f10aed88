"""Jobs as processes: several at once, each when those before it have ended; they end with this process."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gdro.common.errors import UserError
from gdro.common.progress import duration
from gdro.common.sealed import write_record
from gdro.common.terminal import tell
from gdro.tools.comparison.child import GRACE_SECONDS
from gdro.tools.comparison.spec import Job

LOG = "job.log"
FAILED = (
    "failed.json"  # {rc, error} of a job that came to an end of its own, and no good one; not of one that was killed
)
FAILURES = (1, 2)  # exit codes of such an end: an exception, the user's mistake
POLL_SECONDS = 0.2

Start = Callable[[Job], list[str]]
IsDone = Callable[[Job], bool]


def run_jobs(jobs: Sequence[Job], out: Path, *, workers: int, is_done: IsDone, start: Start) -> dict[str, str]:
    """Run what is not done yet, `workers` jobs at once, in the order given as far as `after` allows.

    `start` prepares a job and returns its gdro arguments, or raises UserError. A failing job stops no other, and leaves
    FAILED in its folder until it is started again; returns the one-line error of each that failed, by name.
    """
    waiting = list(jobs)
    ended: set[str] = set()
    failed: dict[str, str] = {}
    known = {job.name for job in jobs}
    progress = _Lines(jobs)
    with _processes() as running:
        while waiting or running:
            for job in list(waiting):
                if len(running) == workers:
                    break
                if not ended.issuperset(known.intersection(job.after)):
                    continue
                waiting.remove(job)
                try:
                    if not is_done(job):
                        running[job] = _launch(start(job), out / job.name, alone=workers == 1)
                        progress.started(job)
                        continue
                    progress.before(job)
                except UserError as error:
                    failed[job.name] = str(error)
                    progress.ended(job, failed[job.name])
                ended.add(job.name)
            for job, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                _close(process)
                ended.add(job.name)
                if process.returncode:
                    failed[job.name] = note_end(out / job.name, process.returncode)
                progress.ended(job, failed.get(job.name))
            if running:
                time.sleep(POLL_SECONDS)
    return failed


def last_line(path: Path) -> str:
    """The last line of a log: gdro's one-line error, or a traceback's last."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("gdro: ").strip() if lines else ""


def note_end(folder: Path, code: int) -> str:
    """The one line that says how a job ended; in its folder too, if it ended of its own."""
    if code < 0:
        return f"killed by signal {-code}"
    error = last_line(folder / LOG) or f"exit code {code}"
    if code in FAILURES:
        write_record(folder / FAILED, {"rc": code, "error": error})
    return error


@contextmanager
def _processes() -> Iterator[dict[Job, subprocess.Popen[bytes]]]:
    running: dict[Job, subprocess.Popen[bytes]] = {}
    try:
        yield running
    finally:
        for process in running.values():
            _close(process)  # tells it to end
        for process in running.values():
            try:
                process.wait(GRACE_SECONDS + 5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _launch(arguments: Sequence[str], folder: Path, *, alone: bool) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILED).unlink(missing_ok=True)
    # one thread each where several run at once: they would fight for the cores, and seconds mean the same for all
    environment = dict(os.environ) if alone else os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / LOG, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "gdro.tools.comparison.child", "gdro", *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
        )


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


class _Lines:
    """One line a job, with the time left by the cost of what is left (an upper bound: jobs may stop at the target)."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.total, self.count = sum(job.nfe for job in jobs), len(jobs)
        self.here = self.past = 0  # evaluations done in this session, and before it
        self.done = 0
        self.start = time.monotonic()
        self.began: dict[str, float] = {}

    def before(self, job: Job) -> None:
        self.past += job.nfe
        self.done += 1

    def started(self, job: Job) -> None:
        self.began[job.name] = time.monotonic()

    def ended(self, job: Job, error: str | None) -> None:
        now = time.monotonic()
        self.here += job.nfe
        self.done += 1
        left = (self.total - self.here - self.past) * (now - self.start) / self.here
        outcome = f"failed: {error}" if error else f"done in {duration(now - self.began[job.name])}"
        tell(f"compare: {self.done}/{self.count} jobs, {job.name} {outcome}; at most {duration(left)} left")
