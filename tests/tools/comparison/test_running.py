"""Processes of a comparison: order, failures, and their end with the process that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gdro.common.errors import UserError
from gdro.common.sealed import read_record
from gdro.tools.comparison.running import FAILED, LOG, note_end, run_jobs
from gdro.tools.comparison.spec import Job

pytestmark = pytest.mark.slow


def job(name: str, *after: str) -> Job:
    return Job(name=name, task="t", method="m", seed=0, candidate=None, after=after, nfe=10)


def test_jobs_wait_for_those_before_them_and_a_failure_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    def start(one: Job) -> list[str]:
        order.append(one.name)
        if one.name == "refused":
            raise UserError("no choice could be made")
        spec = "tiny:ocr:train:2" if one.name != "failing" else "tiny:ocr:trian:2"
        return ["prompts", spec, "--out", str(tmp_path / f"{one.name}.jsonl")]

    jobs = [
        job("late", "failing", "elsewhere"),
        job("done"),
        job("failing"),
        job("refused"),
        job("last", "late", "done"),
    ]
    failed = run_jobs(jobs, tmp_path, workers=2, is_done=lambda one: one.name == "done", start=start)
    assert set(failed) == {"failing", "refused"}
    assert 'did you mean "train"?' in failed["failing"]
    assert failed["refused"] == "no choice could be made"
    assert "done" not in order
    assert order.index("failing") < order.index("late") < order.index("last")
    assert (tmp_path / "last.jsonl").exists()
    assert "trian" in (tmp_path / "failing" / LOG).read_text()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # what was done before is no news
    assert lines[-1].startswith("compare: 5/5 jobs, last done in ")


def test_a_failure_is_noted_until_the_job_is_started_again(tmp_path: Path) -> None:
    spec = "tiny:ocr:trian:2"

    def start(one: Job) -> list[str]:
        return ["prompts", spec, "--out", str(tmp_path / "prompts.jsonl")]

    note = tmp_path / "a" / FAILED
    failed = run_jobs([job("a")], tmp_path, workers=1, is_done=lambda one: False, start=start)
    assert read_record(note) == {"rc": 2, "error": failed["a"]}
    spec = "tiny:ocr:train:2"
    assert run_jobs([job("a")], tmp_path, workers=1, is_done=lambda one: False, start=start) == {}
    assert not note.exists()


@pytest.mark.parametrize(("code", "line"), [(-9, "killed by signal 9"), (130, "interrupted"), (1, "interrupted")])
def test_only_an_end_of_its_own_is_a_failure(tmp_path: Path, code: int, line: str) -> None:
    (tmp_path / LOG).write_text("step 3\ngdro: interrupted\n")
    assert note_end(tmp_path, code) == line
    assert (tmp_path / FAILED).exists() == (code == 1)


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE)
print(child.pid, flush=True)
time.sleep(60)
"""
CHILD = """
import time
from gdro.tools.comparison.child import end_with_parent
end_with_parent()
try:
    time.sleep(60)
except KeyboardInterrupt:
    open("interrupted", "w").close()
"""


def test_a_child_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(1)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while not (tmp_path / "interrupted").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return  # ended; nobody has reaped it
        time.sleep(0.05)
    pytest.fail("the child is still there")
