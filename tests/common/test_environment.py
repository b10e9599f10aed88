"""Variables of the environment that are numbers: each wrong one is a line that names it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from gdro.cli import main
from gdro.common import environment

LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHED, "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", *environment.NUMBERS):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("value", "threads"), [(None, None), ("", None), (" ", None), ("3", 3), ("4,2", 4)])
def test_threads(monkeypatch: pytest.MonkeyPatch, value: str | None, threads: int | None) -> None:
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    environment.check()
    assert environment.threads() == threads


@pytest.mark.parametrize(
    ("name", "value", "launched"),
    [
        *[("OMP_NUM_THREADS", value, False) for value in ("abc", "0", "-1", "4,", ",2", "²", "9" * 5000)],
        *[("WORLD_SIZE", value, False) for value in ("abc", "0", "-2", "²", "1.5")],
        *[("RANK", value, True) for value in (None, "", "abc", "2", "²")],
        *[("LOCAL_RANK", value, True) for value in (None, "x")],
        *[("MASTER_PORT", value, True) for value in (None, "0", "65536", "x")],
        *[("MASTER_ADDR", value, True) for value in (None, "")],
        *[("LOCAL_WORLD_SIZE", value, True) for value in ("0", "3", "x")],
        *[(name, value, False) for name in environment.NUMBERS for value in ("abc", "")],
        ("TQDM_MININTERVAL", "abc", False),
    ],
)
def test_a_wrong_number_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str | None, launched: bool
) -> None:
    for variable, fine in LAUNCHED.items() if launched else ():
        monkeypatch.setenv(variable, fine)
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    assert main(["rewards"]) == 2
    err = capsys.readouterr().err
    found = "not set" if value is None else f'"{value:.100}"'
    assert err.startswith(f"gdro: {name} is {found}; expected a")
    assert err.count("\n") == 1


def test_only_the_first_of_several_processes_says_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable, value in (LAUNCHED | {"RANK": "1", "OMP_NUM_THREADS": "many"}).items():
        monkeypatch.setenv(variable, value)
    assert main(["rewards"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("WORLD_SIZE")  # left over: there is no other
    assert main(["rewards"]) == 2
    assert "OMP_NUM_THREADS" in capsys.readouterr().err


def reads() -> str:
    return str(int(os.environ.get("SOME_LIBRARY_TIMEOUT", "10")))


def names() -> str:
    raise ValueError("no such setting,\ntry SOME_LIBRARY_TIMEOUT=10")


@pytest.mark.parametrize("listing", [reads, names])
def test_a_library_that_stumbles_over_a_variable_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], listing: Callable[[], str]
) -> None:
    monkeypatch.setenv("SOME_LIBRARY_TIMEOUT", "soon")
    monkeypatch.setattr("gdro.rewards.registry.listing", listing)
    assert main(["rewards"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gdro: SOME_LIBRARY_TIMEOUT, a variable of the environment, cannot be used (ValueError: ")
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("ALL_PROXY", "socks5://127.0.0.1:9"), ("SSL_CERT_FILE", "/nowhere")])
def test_a_hub_that_cannot_be_asked_is_one_line_with_the_variable(name: str, value: str) -> None:
    code = "from gdro.common.hub import locate; locate('no-one/nothing', 'x', field='model', expected='a folder')"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {name: value}, capture_output=True, text=True, check=False
    )
    error = ended.stderr.splitlines()[-1]
    assert error.startswith("gdro.common.errors.UserError: model: no-one/nothing is neither a folder nor on the Hub (")
    assert re.search(rf"[;,] {name}.* set\); expected a folder$", error)
