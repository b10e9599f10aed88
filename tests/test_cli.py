"""The command line itself: version, help, overrides apart from options, prompts, quick refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gdro import __version__
from gdro.cli import STAGES, main, parsers, path, split
from gdro.common.errors import UserError
from gdro.common.prompts import read_prompts


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("--version", "--help"):
        with pytest.raises(SystemExit) as ended:
            main([argument])
        assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"gdro {__version__}" in out
    for command in (*STAGES, "run", "demo", "prompts", "import"):
        assert f"    {command} " in out


def test_overrides_are_told_from_options_wherever_they_stand() -> None:
    _, commands = parsers()
    line = "run --train.k 4 my.yaml --train.tau=-1 --out runs/x --model some/where --seed 3 --score.reward=a:b=c"
    rest, overrides = split(line.split(), commands["run"])
    assert rest == ["run", "my.yaml", "--out", "runs/x"]
    assert overrides == [
        ("train.k", "4"),
        ("train.tau", "-1"),
        ("model", "some/where"),
        ("seed", "3"),
        ("score.reward", "a:b=c"),
    ]
    rest, overrides = split(["score", "--reward", "a:b", "--out", "x"], commands["score"])
    assert (rest, overrides) == (["score", "--reward", "a:b", "--out", "x"], [])
    with pytest.raises(UserError, match=r"--train\.k has no value"):
        split(["run", "--train.k", "--out", "x"], commands["run"])


def test_an_option_of_another_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "x.yaml", "--out", "x", "--reward", "a:b"]) == 2
    assert 'unknown option --reward; did you mean "--score.reward"?' in capsys.readouterr().err


def test_the_demo_is_the_packaged_recipe_in_runs_demo() -> None:
    parser, _ = parsers()
    assert parser.parse_args(["demo"]).out == Path("runs/demo")


def test_prompts_by_spec_or_by_options_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    assert main(["prompts", "tiny:geneval:test:12:3", "--out", str(one)]) == 0
    options = ["--task", "geneval", "--split", "test", "--count", "12", "--seed", "3"]
    assert main(["prompts", *options, "--out", str(other)]) == 0
    assert one.read_bytes() == other.read_bytes()
    assert len(read_prompts(one)) == 12
    row = json.loads(one.read_text().splitlines()[0])
    assert {"id", "prompt", "tag", "include"} <= row.keys()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompts", "tiny:ocr:train:5", "--task", "ocr", "--out", "x.jsonl"], "one of the two forms"),
        (["prompts", "--task", "ocr", "--out", "x.jsonl"], "--task, --split and --count"),
        (["prompts", "tiny:ocr:trian:5", "--out", "x.jsonl"], 'did you mean "train"?'),
        (["prompts", "tiny:ocr:train:5", "--out", "x.txt"], "ends in .jsonl"),
        (["prompts", "", "--out", "x.jsonl"], '"" is not a spec'),
        (["prompts", "tiny:ocr:train:5", "--out", "x.jsonl", "--bogus"], "--bogus"),
    ],
)
def test_prompts_refuses_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_path_may_be_empty(capsys: pytest.CaptureFixture[str]) -> None:
    """Path("") would be the current folder."""
    _, commands = parsers()
    for name, command in commands.items():
        options = [action for action in command._actions if action.type is path]
        assert not any(action.type is Path for action in command._actions)
        for option in (action.option_strings[0] for action in options if action.option_strings):
            with pytest.raises(UserError, match=rf"^gdro {name}: argument {option}: it is empty; expected a path"):
                command.parse_args([option, ""])
    assert main(["train", "x.yaml", "--out", ""]) == main(["plan", ""]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "gdro: gdro train: argument --out: it is empty; expected a path",
        "gdro: gdro plan: argument config: it is empty; expected a path",
    ]


@pytest.mark.slow
def test_nothing_heavy_is_imported_to_read_a_configuration() -> None:
    """A misspelled field is told of in a second or two: diffusers, transformers, peft and the OCR engine stay out."""
    script = (
        "import sys; import gdro.runner.pipeline; "
        "heavy = 'diffusers', 'transformers', 'peft', 'rapidocr', 'matplotlib', 'cv2', 'ray'; "
        "print([m for m in heavy if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_hyperparameters_of_an_own_objective_are_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_margins.py").write_text(
        "from dataclasses import dataclass\n"
        "from gdro.objectives.base import ForwardObjective\n"
        "@dataclass(frozen=True)\n"
        "class Margin(ForwardObjective):\n"
        "    margin: float = 0.1\n"
        "    def loss(self, batch):\n"
        "        return batch.d[:, 0], {'loss_rank': batch.d[:, 0].detach()}\n"
    )
    own = ["plan", "demo", "--gpu", "h200", "--train.objective", "my_margins:Margin"]
    assert main([*own, "--train.margin", "0.2"]) == 0
    assert main([*own, "--train.margin", "wide"]) == 2
    assert 'train.margin is "wide"; expected a number' in capsys.readouterr().err
    assert main([*own, "--train.tau", "0.2"]) == 2
    assert 'train.tau is 0.2, which objective "my_margins:Margin" does not have' in capsys.readouterr().err
