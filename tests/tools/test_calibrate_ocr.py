"""`gdro calibrate ocr`: figures by hand, on folders and stores; pairs of engines where PaddleOCR is installed too."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from renders import sign

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.groups.store import GroupWriter, ImageRow
from gdro.rewards.ocr.engines import read
from gdro.rewards.ocr.reward import ocr
from gdro.tools.calibrate_ocr import Pictures, agreement, calibrate_ocr, compare, pictures_of_folder, table

PADDLE = all(importlib.util.find_spec(package) for package in ("paddleocr", "paddle"))
TEXTS = {"a.png": "OPEN", "b.png": 'a sign that says "cafe"', "c.png": "BOLT"}  # c shows BOOK


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, word in (("a.png", "OPEN"), ("b.png", "CAFE"), ("c.png", "BOOK")):
        sign(word).save(folder / name)
    rows = [{"file_name": name, "text": text} for name, text in TEXTS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


def test_figures_of_a_folder(folder: Path, tmp_path: Path) -> None:
    """BOOK for BOLT is two edits of four: rewards 1, 1, 1/2."""
    out = tmp_path / "calibration.json"
    shown = calibrate_ocr(folder, out, engines=["rapidocr"])
    found = json.loads(out.read_text(encoding="utf-8"))
    one = found["engines"]["rapidocr"]
    assert one["mean_reward"] == pytest.approx(5 / 6)
    assert one["exact_match"] == pytest.approx(2 / 3)
    assert one["mean_edit_distance"] == pytest.approx(2 / 3)
    assert one["images_per_second"] > 0
    assert one["version"] == ocr().version
    assert [r["target"] for r in found["readings"]] == ["OPEN", "cafe", "BOLT"]
    assert [r["rapidocr"]["reward"] for r in found["readings"]] == [1.0, 1.0, 0.5]
    assert (found["count"], found["agreement"], found["absent"]) == (3, [], {})
    assert "| rapidocr | 0.833 | 66.7 % | 0.67 |" in shown


def test_limit_spreads_over_the_images(folder: Path, tmp_path: Path) -> None:
    calibrate_ocr(folder, tmp_path / "c.json", engines=["rapidocr"], limit=2)
    found = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert [r["image"] for r in found["readings"]] == ["a.png", "b.png"]
    pictures = Pictures([str(i) for i in range(10)], ["x"] * 10, lambda i: Image.new("RGB", (1, 1), (i, 0, 0)))
    some = pictures.thinned(3)
    assert some.names == ["0", "3", "6"]
    assert [some.load(i).getpixel((0, 0)) for i in range(3)] == [(0, 0, 0), (3, 0, 0), (6, 0, 0)]
    assert pictures.thinned(10) is pictures


@pytest.mark.parametrize("inside", ["", "groups"])
def test_images_of_a_store_or_a_run(tmp_path: Path, inside: str) -> None:
    words = {"g": ["OPEN", "BOOK"], "h": ["TAXI"]}
    targets = {"g": "open", "h": "taxi"}
    rows = [
        ImageRow(
            group_id=group,
            index=i,
            prompt=Prompt(group, f'a sign that says "{targets[group]}"'),
            image=sign(word),
            latent=torch.zeros(1, 1),
            seed=0,
            scheduler="s",
            num_inference_steps=1,
            guidance_scale=1.0,
            max_sequence_length=1,
            height=32,
            width=64,
            generator="g",
            revision="r",
            round=0,
        )
        for group, shown in words.items()
        for i, word in enumerate(shown)
    ]
    text = {group: {"prompt_embeds": torch.zeros(1, 1, 1)} for group in words}
    GroupWriter(tmp_path / "run" / inside).write_shard(0, rows, text)
    calibrate_ocr(tmp_path / "run", tmp_path / "c.json", engines=["rapidocr"])
    found = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert [(r["image"], r["target"]) for r in found["readings"]] == [("g/0", "open"), ("g/1", "open"), ("h/0", "taxi")]
    rewards = [r["rapidocr"]["reward"] for r in found["readings"]]
    assert rewards[0] == rewards[2] == 1.0
    assert rewards[1] < 1.0


def test_agreement_by_hand() -> None:
    a, b = np.array([1.0, 0.5, 0.0, 1.0]), np.array([1.0, 0.75, 0.5, 0.0])
    found = agreement(a, b)
    assert found["equal_verdicts"] == 0.75  # the last is right for one only
    assert found["worst"] == [3, 2, 1]  # differences 1, 1/2, 1/4; equal ones are no disagreement
    cov = ((a - a.mean()) * (b - b.mean())).mean()
    assert found["correlation"] == pytest.approx(cov / a.std() / b.std())
    assert agreement(a, np.ones(4))["correlation"] is None
    assert agreement(a, a)["worst"] == []


def test_two_readers_side_by_side(folder: Path) -> None:
    """The second reads with the right half of each sign painted over."""

    def half(i: int, image: Image.Image) -> dict:
        image = image.copy()
        image.paste("white", (image.width // 2, 0, image.width, image.height))
        return read(i, image)

    found = compare(pictures_of_folder(folder), {"whole": read, "half": half})
    assert found["engines"]["half"]["mean_reward"] < found["engines"]["whole"]["mean_reward"]
    (pair,) = found["agreement"]
    assert pair["engines"] == ["whole", "half"]
    assert pair["equal_verdicts"] <= 1 / 3 + 1e-9  # only BOLT is wrong for both
    assert pair["worst"]
    shown = table({"images": "here", "count": 3, **found, "absent": {"third": "not installed; pip install it"}})
    assert "whole and half: correlation" in shown
    assert "| third | not installed; pip install it | – | – | – |" in shown
    assert "| worst disagreements | target | whole | half |" in shown


@pytest.mark.skipif(PADDLE, reason="PaddleOCR is installed")
def test_missing_engine_is_told_of_unless_it_was_asked_for(folder: Path, tmp_path: Path) -> None:
    shown = calibrate_ocr(folder, tmp_path / "c.json", limit=1)
    assert '| paddleocr | not installed; pip install "gdro[paddle]" |' in shown
    assert "paddleocr" in json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["absent"]
    with pytest.raises(UserError, match=r'"paddleocr" needs .*not installed; expected `pip install "gdro\[paddle\]"`'):
        calibrate_ocr(folder, tmp_path / "d.json", engines=["rapidocr", "paddleocr"])
    assert not (tmp_path / "d.json").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "metadata.jsonl:2 is not JSON"),
        ("[1]", 'metadata.jsonl:2 has no text in "file_name"'),
        ('{"text": "OPEN"}', 'metadata.jsonl:2 has no text in "file_name"'),
        ('{"file_name": "a.png"}', r'metadata.jsonl:2 has None in "prompt"; expected "text"'),
        ('{"file_name": "a.png", "text": 5}', r'metadata.jsonl:2 has 5 in "text"'),
        ('{"file_name": "z.png", "text": "x"}', r"metadata.jsonl:2: .*z.png not found; expected an image"),
        ('{"file_name": "../a.png", "text": "x"}', r"'../a.png'; expected an image inside the folder"),
        (r'{"file_name": "a.png", "text": "a 12\" record, \"HELLO\""}', "metadata.jsonl:2: prompt .* an odd number"),
        ('{"file_name": "a.png", "prompt": "x", "target": 5}', "metadata.jsonl:2: prompt 'x' has \"target\" 5"),
        ('{"file_name": "a.png", "prompt": "no quotes"}', "metadata.jsonl:2: prompt 'no quotes' has no text"),
    ],
)
def test_bad_rows_are_named(folder: Path, row: str, message: str) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + row, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        pictures_of_folder(folder)


def test_bad_arguments_are_named(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    with pytest.raises(UserError, match=r'--engine is "paddelocr", which is not an engine; did you mean "paddleocr"\?'):
        calibrate_ocr(folder, out, engines=["paddelocr"])
    with pytest.raises(UserError, match="--limit is 0; expected at least 1"):
        calibrate_ocr(folder, out, limit=0)
    with pytest.raises(UserError, match=r"--out is .*c.md; expected a name that ends in .json"):
        calibrate_ocr(folder, tmp_path / "c.md")
    with pytest.raises(UserError, match="has no images to read; expected metadata"):
        calibrate_ocr(tmp_path / "none", out)
    (folder / "c.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"metadata\.jsonl:\d: .*c\.png is not an image"):
        calibrate_ocr(folder, out, engines=["rapidocr"])
    assert not out.exists()
