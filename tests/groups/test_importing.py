"""Images made elsewhere become a store and a file of rewards, or every bad row is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.groups.importing import import_folder, read_metadata
from gdro.groups.scores import read_rewards
from gdro.groups.store import GroupStore

WORDS = {"g1": "a red wall", "7": "a blue wall"}


def make_rows(folder: Path) -> list[dict[str, Any]]:
    """Two groups of three 64x32 images, interleaved in the file."""
    rows: list[dict[str, Any]] = []
    for i in range(6):
        group: Any = "g1" if i % 2 == 0 else 7
        pixels = np.random.default_rng(i).integers(0, 256, (32, 64, 3), dtype=np.uint8)
        name = f"images/{i}.png"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
        rows.append({"file_name": name, "prompt": WORDS[str(group)], "reward": i / 10, "group": group, "tag": "wall"})
    return rows


def write_rows(folder: Path, rows: list[Any]) -> None:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text)


def run(folder: Path, model: Any, **settings: Any) -> Path:
    values = {"guidance_scale": 3.5, "max_sequence_length": 24} | settings
    return import_folder(read_metadata(folder / "source"), model, folder / "groups", folder / "rewards", **values)


def test_import_makes_a_store_and_rewards(tmp_path: Path, flux: Any) -> None:
    """Latents and text are what the model itself makes of the images and the prompt."""
    rows = make_rows(tmp_path / "source")
    write_rows(tmp_path / "source", rows)
    path = run(tmp_path, flux)
    store = GroupStore(tmp_path / "groups")
    assert store.group_ids == ["g1", "7"]
    assert store.prompt("7") == Prompt("7", "a blue wall", {"tag": "wall"})
    assert store.settings["guidance_scale"] == 3.5
    assert store.image_size(store.group_ids[0]) == (32, 64)
    assert store.settings["revision"] == flux.revision
    rewards = read_rewards(path, store)
    assert {group: r.tolist() for group, r in rewards.items()} == {"g1": [0.0, 0.2, 0.4], "7": [0.1, 0.3, 0.5]}
    images = [Image.open(tmp_path / "source" / row["file_name"]) for row in rows if row["group"] == 7]
    assert [np.array(i).tolist() for i in store.images("7")] == [np.array(i).tolist() for i in images]
    assert torch.equal(store.latents("7"), flux.encode_images(images))
    expected = flux.encode_text(["a blue wall"], 24)
    assert all(torch.equal(value, expected[name]) for name, value in store.text("7").items())

    assert len(pd.read_parquet(tmp_path / "groups", columns=["image_id"])) == 6, "the whole folder opens elsewhere"

    before = {p.name: p.read_bytes() for p in (tmp_path / "groups").iterdir()}
    assert run(tmp_path, flux) == path
    assert {p.name: p.read_bytes() for p in (tmp_path / "groups").iterdir()} == before
    with pytest.raises(UserError, match=r"was imported with guidance_scale 3.5, now 4.0"):
        run(tmp_path, flux, guidance_scale=4.0)


def test_every_bad_row_is_named(tmp_path: Path, flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdro.groups.importing.SHOWN", 100)
    rows: list[Any] = make_rows(tmp_path / "source")
    Image.new("RGB", (32, 32)).save(tmp_path / "source" / "square.png")
    (tmp_path / "source" / "text.png").write_text("no image")
    good = rows[0]
    bad = [
        ("{", "is not JSON"),
        ("[1]", "is a list; expected an object"),
        ({k: v for k, v in good.items() if k != "reward"}, 'has no "reward"'),
        (good | {"reward": "0.5"}, 'has "reward" "0.5"; expected a finite number'),
        (good | {"reward": True}, 'has "reward" true'),
        (json.dumps(good | {"reward": float("nan")}), 'has "reward" NaN'),
        (good | {"prompt": " "}, 'has "prompt" " "; expected text'),
        (good | {"group": None}, 'has "group" null'),
        (good | {"file_name": "none.png"}, "none.png not found"),
        (good | {"file_name": "text.png"}, "text.png is not an image"),
        (good | {"file_name": "../source2/0.png"}, "expected a file inside the folder"),
        (good | {"file_name": "square.png"}, 'square.png is 32x32; the first of group "g1" is 64x32'),
        (good, "names 0.png again, after"),
        (good | {"id": "x"}, 'has "id"'),
        (rows[1] | {"file_name": "images/2.png", "prompt": "another"}, "names 2.png again"),
    ]
    write_rows(tmp_path / "source", [*rows, "", *(row for row, _ in bad)])
    with pytest.raises(UserError) as error:
        run(tmp_path, flux)
    lines = str(error.value).split("; also ")
    assert len(lines) == len(bad)
    assert "\n" not in str(error.value)
    for number, (line, (_, message)) in enumerate(zip(lines, bad, strict=True), len(rows) + 2):
        assert f"metadata.jsonl:{number}" in line
        assert message in line
    assert not (tmp_path / "groups").exists()


def test_of_many_mistakes_the_first_are_told(tmp_path: Path, flux: Any) -> None:
    write_rows(tmp_path / "source", [*make_rows(tmp_path / "source"), *["{"] * 20])
    with pytest.raises(UserError, match=r"jsonl:7 .*jsonl:8 .*jsonl:9 .*; and 17 more mistakes in .*metadata.jsonl$"):
        run(tmp_path, flux)


def test_a_line_separator_inside_a_prompt_is_kept(tmp_path: Path, flux: Any) -> None:
    rows = [row | {"prompt": f"{row['prompt']}\u2028x\x85"} for row in make_rows(tmp_path / "source")]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "source" / "metadata.jsonl").write_bytes(text.encode())
    run(tmp_path, flux)
    assert GroupStore(tmp_path / "groups").prompt("7").text == "a blue wall\u2028x\x85"


def test_groups_that_cannot_be_compared_are_named(tmp_path: Path, flux: Any) -> None:
    rows = make_rows(tmp_path / "source")
    write_rows(tmp_path / "source", [*rows[:5], rows[5] | {"prompt": "a green wall"}])
    with pytest.raises(UserError, match=r'metadata.jsonl:6: group "7" has another prompt or record than at .*:2'):
        run(tmp_path, flux)
    write_rows(tmp_path / "source", [*rows[:5], rows[5] | {"group": "alone"}])
    with pytest.raises(UserError, match=r'metadata.jsonl:6: group "alone" has one image'):
        run(tmp_path, flux)


def test_damaged_image_is_named(tmp_path: Path, flux: Any) -> None:
    """Its header is whole, so it is found out only by reading all of it; that is before any work."""
    rows = make_rows(tmp_path / "source")
    write_rows(tmp_path / "source", rows)
    path = tmp_path / "source" / rows[3]["file_name"]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"metadata.jsonl:4: .*3.png is damaged"):
        run(tmp_path, flux)
    assert not (tmp_path / "groups").exists()

    Image.new("RGB", (64, 32)).save(path)
    run(tmp_path, flux)


def test_missing_and_empty_metadata(tmp_path: Path, flux: Any) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(UserError, match=r"metadata.jsonl not found"):
        run(tmp_path, flux)
    write_rows(tmp_path / "source", [""])
    with pytest.raises(UserError, match=r"has no rows"):
        run(tmp_path, flux)


def test_store_of_another_origin_is_refused(tmp_path: Path, flux: Any) -> None:
    write_rows(tmp_path / "source", make_rows(tmp_path / "source"))
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "groups-00000.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="holds groups of another origin"):
        run(tmp_path, flux)


def test_pixels_are_those_a_viewer_shows(tmp_path: Path, flux: Any) -> None:
    """A phone's upright picture is stored lying; a snapshot of the Hub is made of links; both are one group."""
    rows = make_rows(tmp_path / "source")[:3:2]
    write_rows(tmp_path / "source", rows)
    exif = Image.Exif()
    exif[274] = 6
    first, second = (tmp_path / "source" / row["file_name"] for row in rows)
    Image.open(first).transpose(Image.Transpose.ROTATE_90).save(first, exif=exif)
    second.rename(tmp_path / "blob")
    second.symlink_to(tmp_path / "blob")
    run(tmp_path, flux)
    store = GroupStore(tmp_path / "groups")
    assert store.image_size("g1") == (32, 64)
    for i, image in zip((0, 2), store.images("g1"), strict=True):
        expected = np.random.default_rng(i).integers(0, 256, (32, 64, 3), dtype=np.uint8)
        assert np.array_equal(np.asarray(image), expected)
