"""One process a run directory, on any system."""

import subprocess
import sys
from pathlib import Path

import pytest

from gdro.common.errors import UserError
from gdro.runner.directory import alone

pytestmark = pytest.mark.slow

# Windows has msvcrt in place of fcntl; here it locks as that does, so that all but the lock itself is the real thing
WINDOWS = """
import os, sys, types
sys.modules["fcntl"] = None
import gdro.runner.planning.report, gdro.runner.pipeline
from gdro.cli import main
from pathlib import Path
from gdro.runner.directory import alone
sys.modules["msvcrt"] = types.SimpleNamespace(
    LK_NBLCK=2, locking=lambda handle, mode, count: os.lockf(handle, {2: os.F_TLOCK}[mode], count)
)
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("script", [WINDOWS, WINDOWS.replace('sys.modules["fcntl"] = None', "")])
def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path, script: str) -> None:
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="which another gdro process is using"), alone(tmp_path / "run"):
            pass
        second = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        assert "which another gdro process is using" in second.stderr
        first.kill()
    with alone(tmp_path / "run"):
        pass
