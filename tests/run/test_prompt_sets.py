"""The prompts that come with gdro are the script's, fit for their rewards, and held out from each other."""

import json
import re
import runpy
from collections import Counter
from collections.abc import Hashable
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gdro.cli import main
from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.rewards.geneval.colors import COLORS
from gdro.rewards.geneval.reward import GenevalReward
from gdro.rewards.geneval.rules import TAGS
from gdro.rewards.ocr.reward import OcrReward, target_of
from gdro.runner.prompt_sets import FOLDER, SPLITS, named_prompts

SCRIPT: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "prompt_sets.py")))
SIZES = {"train": 1000, "validation": 200, "test": 200}


def test_the_script_writes_what_is_shipped(tmp_path: Path) -> None:
    SCRIPT.write(tmp_path)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    assert len(made) == 6


@pytest.mark.parametrize("task", ["ocr", "geneval"])
def test_sizes_and_no_text_twice(task: str) -> None:
    """Whatever its case and spacing."""
    sets = {split: named_prompts(f"gdro:{task}:{split}") for split in SPLITS}
    assert {split: len(prompts) for split, prompts in sets.items()} == SIZES
    texts = [" ".join(prompt.text.lower().split()) for prompts in sets.values() for prompt in prompts]
    assert len(set(texts)) == sum(SIZES.values())


def test_ocr_targets() -> None:
    """One to six words, some with digits, read as the reward reads them; none is asked for twice in all sets."""
    prompts = [prompt for split in SPLITS for prompt in named_prompts(f"gdro:ocr:{split}")]
    OcrReward().check(prompts)
    targets = [target_of(prompt) for prompt in prompts]
    assert all(f'"{target}"' in prompt.text for target, prompt in zip(targets, prompts, strict=True))
    assert len({"".join(target.lower().split()) for target in targets}) == len(targets)
    words = Counter(len(target.split()) for target in targets)
    assert set(words) == {1, 2, 3, 4, 5, 6}
    assert 0.2 < sum(any(c.isdigit() for c in target) for target in targets) / len(targets) < 0.5


class Coco:
    """A detector of COCO's classes, by GenEval's names, that is never asked to look."""

    name, version, parallel, classes, colors = "coco", "1", False, SCRIPT.CLASSES, COLORS


def what(record: dict[str, Any]) -> Hashable:
    """What a prompt combines, whichever way round it is said."""
    if record["tag"] != "position":
        return record["tag"], frozenset(frozenset(entry.items()) for entry in record["include"])
    relation = record["include"][1]["position"][0]
    below, above = record["include"][0]["class"], record["include"][1]["class"]
    if relation in ("right of", "below"):
        below, above = above, below
    return "position", relation in ("above", "below"), below, above


def test_geneval_records() -> None:
    """The reward takes them, the six tags take turns, and no split combines what another does."""
    combined: dict[str, set[Hashable]] = {}
    for split in SPLITS:
        prompts = named_prompts(f"gdro:geneval:{split}")
        GenevalReward(Coco()).check(prompts)
        assert [prompt.fields["tag"] for prompt in prompts[:12]] == [*TAGS, *TAGS]
        combined[split] = {what(prompt.fields) for prompt in prompts}
        assert {e["count"] for p in prompts for e in p.fields["include"] if p.fields["tag"] == "counting"} == {2, 3, 4}
    for one, other in combinations(SPLITS, 2):
        assert not combined[one] & combined[other]


def test_no_official_prompt_is_among_them() -> None:
    """Neither in its words, nor in what it combines: here are some of the 553."""
    prompts = [prompt for split in SPLITS for prompt in named_prompts(f"gdro:geneval:{split}")]
    assert not [prompt.text for prompt in prompts if prompt.text.startswith("a photo of")]
    official = [
        ("two_object", ("bench", "sports ball")),
        ("counting", ("clock", "2")),
        ("colors", ("fire hydrant", "blue")),
        ("position", ("dog", "right of", "teddy bear")),
    ]
    for tag, combination in official:
        assert SCRIPT.digest(tag, combination) in SCRIPT.OFFICIAL
        assert combination not in SCRIPT.combinations_of(tag)
    assert SCRIPT.digest("two_object", ("sports ball", "bench")) in SCRIPT.OFFICIAL
    assert SCRIPT.digest("position", ("teddy bear", "left of", "dog")) in SCRIPT.OFFICIAL


@pytest.mark.parametrize(
    ("tag", "combination", "text"),
    [
        ("single_object", ("umbrella",), "an umbrella"),
        ("single_object", ("scissors",), "a pair of scissors"),
        ("colors", ("sandwich", "orange"), "an orange sandwich"),
        ("counting", ("knife", "3"), "three knives"),
        ("counting", ("bench", "2"), "two benches"),
        ("counting", ("bus", "4"), "four buses"),
        ("counting", ("person", "4"), "four people"),
        ("counting", ("sheep", "2"), "two sheep"),
        ("counting", ("computer mouse", "2"), "two computer mice"),
        ("position", ("apple", "above", "oven"), "an apple above an oven"),
        ("color_attr", ("skis", "red", "airplane", "blue"), "a red pair of skis and a blue airplane"),
    ],
)
def test_grammar(tag: str, combination: tuple[str, ...], text: str) -> None:
    assert SCRIPT.record(tag, combination)[0] == text


def test_articles_of_all() -> None:
    texts = [prompt.text for split in SPLITS for prompt in named_prompts(f"gdro:geneval:{split}")]
    assert not [text for text in texts if re.search(r"\ba [aeiou]|\ban [^aeiou]", text)]


def test_a_part_of_a_set_is_its_beginning(tmp_path: Path) -> None:
    whole = named_prompts("gdro:geneval:test")
    assert named_prompts("gdro:geneval:test:7") == whole[:7]
    assert main(["prompts", "gdro:geneval:test:7", "--out", str(tmp_path / "mine.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert [Prompt(row.pop("id"), row.pop("prompt"), row) for row in rows] == whole[:7]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gdro:ocr", r'"gdro:ocr" is not a name; expected gdro:TASK:SPLIT\[:COUNT\], e.g. gdro:ocr:train'),
        ("gdro:orc:train", r'names the task "orc"; did you mean "ocr"'),
        ("gdro:ocr:../train", r'names the split "../train"'),
        ("gdro:ocr:test:0", r'asks for "0" prompts; expected 1 to 200'),
        ("gdro:ocr:test:201", r'asks for "201" prompts; expected 1 to 200'),
        ("gdro:ocr:test:²", "expected 1 to 200"),
        ("gdro:ocr:test:" + "9" * 5000, "expected 1 to 200"),
    ],
)
def test_a_wrong_name_is_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        named_prompts(name)
