"""Whatever a file or a command line holds, it is read or refused in one line, and at once."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gdro.common.errors import UserError
from gdro.common.hub import locate
from gdro.common.prompts import read_prompts
from gdro.common.reading import parse_json, read_json, read_text, reading
from gdro.common.yaml import parse_yaml, read_yaml
from gdro.groups.importing import read_metadata
from gdro.groups.scores import read_header
from gdro.rewards.judges.unified_prompts import template_text
from gdro.rewards.neural.clip import read_phrases
from gdro.rewards.neural.published import tensor_names
from gdro.runner.config import load_config
from gdro.runner.directory import alone
from gdro.tools.calibrate_ocr import pictures_of_folder
from gdro.tools.geneval_results import read_official
from gdro.tools.unigenbench.published import published_prompt
from gdro.tools.unigenbench.reading import read_prompt_file
from gdro.training.log import read_metrics

DEEP, LONG = "[" * 200_000, "1" * 5_000

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "yaml": ("x.yaml", read_yaml),
    "prompts": ("x.jsonl", read_prompts),
    "text prompts": ("x.txt", read_prompts),
    "metadata": ("metadata.jsonl", lambda path: read_metadata(path.parent)),
    "pictures": ("metadata.jsonl", lambda path: pictures_of_folder(path.parent)),
    "geneval": ("x.jsonl", read_official),
    "metrics": ("metrics.jsonl", lambda path: read_metrics(path)),
    "benchmark": ("x.csv", read_prompt_file),
    "judge prompt": ("x.py", lambda path: published_prompt(path, "en")),
    "template": ("x.txt", lambda path: template_text("", str(path))),
    "phrases": ("x.txt", lambda path: read_phrases(path, "safe")),
    "rewards": ("x.parquet", read_header),
    "tensors": ("x.safetensors", lambda path: tensor_names(path, "model")),
}
LINES = ("prompts", "metadata", "pictures", "geneval", "metrics")


def line(call: Callable[[], Any]) -> str:
    """The one line with which the call is refused."""
    with pytest.raises(UserError) as refused:
        call()
    text = str(refused.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 1_000
    return text


@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_file_of_text_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    """A missing file, a folder, a FIFO (which would be waited for), bytes that are no text, no permission."""
    name, read = READERS[kind]
    path = tmp_path / name
    if kind != "metrics":  # a run that has none yet
        assert "not found" in line(lambda: read(path))
    path.mkdir()
    assert f"{path} is a folder" in line(lambda: read(path))
    path.rmdir()
    os.mkfifo(path)
    assert f"{path} is not a regular file" in line(lambda: read(path))
    path.unlink()
    path.write_bytes(b"\x00\xff\xfe\x01 no text")
    assert str(path) in line(lambda: read(path))
    if os.geteuid():
        path.chmod(0)
        assert f"{path} cannot be read: Permission denied" in line(lambda: read(path))


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (DEEP, "recursion"),
        ("[" * 900 + "]" * 900, "more than 100 deep"),
        (LONG, "5000 digits"),
        ('"\\ud800"', "surrogate"),
    ],
)
def test_records_that_json_allows_and_nothing_can_hold(kind: str, value: str, cause: str, tmp_path: Path) -> None:
    name, read = READERS[kind]
    path = tmp_path / name
    path.write_text('{"step": 1, "prompt": "a", "file_name": "a.png", "group": 1, "reward": ' + value + "}\n")
    refused = line(lambda: read(path))
    assert f"{path}:1 is " in refused
    assert cause in refused


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, "x:5: more than 10,000 values, aliases expanded"),
        ("a: &a [*a]", "x:1: an alias inside what it stands for"),
        (DEEP[:5000], "x:1: nested more than 100 deep"),
        (f"a: {LONG}", "x:1: not a valid int (an integer of 5000 digits; expected at most 300)"),
        ("a: 1\nb: !!float x", "x:2: not a valid float (could not convert string to float: 'x')"),
        ("a: !!int [1]", "x:1: expected a scalar node, but found sequence"),
        ("a: !!bool 7", "x:1: not a valid bool (KeyError '7')"),
        ("a: !!timestamp 7", "x:1: not a valid timestamp"),
        ('a: "\\ud800"', "x:1: half of a surrogate pair"),
        ("a: !!python/name:os.system", "x:1: could not determine a constructor"),
        ("a: !!map 7", "x:1: expected a mapping node, but found scalar"),
        ("a: \0", "x: unacceptable character #x0000"),
    ],
)
def test_yaml_that_ends_in_one_line(text: str, problem: str) -> None:
    assert problem in line(lambda: parse_yaml(text, "x"))


def test_anchors_stay_allowed() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: {c: *a, d: *a}", "x") == {"a": [1, 2], "b": {"c": [1, 2], "d": [1, 2]}}


def test_options_of_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("sample: {prompts: a.txt}\nevaluate: {prompts: b.txt}\n")
    assert line(lambda: load_config(config, [("train.beta", DEEP)])) == "--train.beta:1: nested more than 100 deep"
    assert line(lambda: load_config(config, [("train.beta", BOMB)])).startswith("--train.beta:5: more than 10,000")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    for kind, (file, read) in READERS.items():
        if file == "metadata.jsonl" or kind == "metrics":
            continue
        suffix = Path(file).suffix
        assert "cannot be read" in line(lambda read=read, suffix=suffix: read(tmp_path / f"{name}{suffix}"))
    assert "model: " in line(lambda: locate(name, "config.json", field="model", expected="a folder"))
    assert "--out is " in line(lambda: alone(tmp_path / name).__enter__())


def test_headers_that_ask_for_what_is_not_there(tmp_path: Path) -> None:
    """Of numpy and safetensors: whatever the library raises is a line with the cause."""
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(3))
    whole = path.read_bytes()
    for header in (b"{'descr': '<f8', 'shape': (" + b"9" * 30 + b",)", b"((((", b"{'descr': 'O'", b"\xff" * 40):
        path.write_bytes(whole[:10] + header.ljust(117) + whole[127:])
        assert f"{path} is damaged" in line(lambda: _load(path))
    for header in (b"[" * 3000, b'{"a": 1}', b"\xff" * 9):
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        assert f"model: {path} is damaged" in line(lambda: tensor_names(path, "model"))


def _load(path: Path) -> None:
    with reading(path, "an array"):
        np.load(path)


def test_what_is_right_is_read(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, "é\u2028"], "b": {"c": 10**299}}
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(value, ensure_ascii=False), encoding="utf-8")
    assert read_json(tmp_path / "a.json", "an object") == value
    assert parse_json('"\\ud83d\\ude00"', "x") == "😀"
    assert parse_json("[" * 100 + "]" * 100, "x") is not None
    (tmp_path / "a.txt").write_text("é")
    assert read_text(tmp_path / "a.txt", "a text") == "é"
