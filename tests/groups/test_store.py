"""The store of groups: what goes in comes out, other libraries can read it, and damage is named."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.groups.store import GroupStore, GroupWriter, ImageRow
from gdro.models.base import Text


def picture(seed: int, size: tuple[int, int] = (16, 8)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_rows(group: str, count: int = 3) -> list[ImageRow]:
    prompt = Prompt(f"p-{group}", 'a sign that says "hi", “x”', {"scene": {"wall": "red"}, "tag": None})
    return [
        ImageRow(
            group_id=group,
            index=i,
            prompt=prompt,
            image=picture(i),
            latent=torch.randn(2, 4, generator=torch.Generator().manual_seed(i)),
            seed=7,
            scheduler="FlowMatchEulerDiscreteScheduler",
            num_inference_steps=4,
            guidance_scale=3.5,
            max_sequence_length=16,
            height=8,
            width=16,
            generator="tiny",
            revision="abc",
            round=0,
        )
        for i in range(count)
    ]


def make_text(group: str) -> Text:
    generator = torch.Generator().manual_seed(len(group))
    return {
        "prompt_embeds": torch.randn(1, 5, 6, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 3, generator=generator).to(torch.bfloat16),
    }


def write(folder: Path, shards: list[list[str]]) -> GroupStore:
    writer = GroupWriter(folder)
    for i, groups in enumerate(shards):
        writer.write_shard(i, [r for g in groups for r in make_rows(g)], {g: make_text(g) for g in groups})
    return GroupStore(folder)


def test_images_of_two_sizes_in_a_group_are_refused(tmp_path: Path) -> None:
    """Within a group images are compared, and go through the model together; other groups may be of another size."""
    first, second = make_rows("a"), make_rows("b")
    second = [replace(row, image=row.image.resize((8, 16)), height=16, width=8) for row in second]
    texts = {group: make_text(group) for group in "ab"}
    GroupWriter(tmp_path / "two").write_shard(0, [*first, *second], texts)
    store = GroupStore(tmp_path / "two")
    assert (store.image_size("a"), store.image_size("b")) == ((8, 16), (16, 8))
    mixed = [*first[:1], *(replace(row, group_id="a") for row in second[1:])]
    GroupWriter(tmp_path / "mixed").write_shard(0, mixed, {"a": make_text("a")})
    with pytest.raises(UserError, match='images of 16x8 and 8x16 in group "a"; expected one size throughout a group'):
        GroupStore(tmp_path / "mixed")


def test_round_trip_over_two_shards(tmp_path: Path) -> None:
    """Two groups that share a prefix, and an id with a slash, do not mix."""
    store = write(tmp_path, [["a", "a/b"], ["c@1"]])
    assert store.group_ids == ["a", "a/b", "c@1"]
    assert store.image_ids("a/b") == ["a/b/0", "a/b/1", "a/b/2"]
    for group in store.group_ids:
        rows = make_rows(group)
        assert store.prompt(group) == rows[0].prompt
        assert torch.equal(store.latents(group), torch.stack([row.latent for row in rows]))
        assert [np.array(i).tolist() for i in store.images(group)] == [np.array(r.image).tolist() for r in rows]
        text, expected = store.text(group), make_text(group)
        assert text.keys() == expected.keys()
        assert all(
            torch.equal(text[name], expected[name]) and text[name].dtype == expected[name].dtype for name in text
        )
    assert store.settings == {
        "guidance_scale": 3.5,
        "max_sequence_length": 16,
        "generator": "tiny",
        "revision": "abc",
    }


def test_datasets_and_pandas_open_it(tmp_path: Path) -> None:
    write(tmp_path / "groups", [["a"], ["b"]])
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "groups" / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(loaded) == 6
    assert isinstance(loaded.features["image"], datasets.Image)
    assert np.array_equal(np.array(loaded[1]["image"]), np.array(picture(1)))
    frame = pd.read_parquet(tmp_path / "groups")
    assert list(frame["image_id"]) == [f"{group}/{index}" for group in "ab" for index in range(3)]
    latent = np.frombuffer(frame["latent"][1], "<f4").reshape(frame["latent_shape"][1])
    assert np.array_equal(latent, make_rows("a")[1].latent.numpy())
    assert json.loads(frame["record"][0])["scene"] == {"wall": "red"}


def test_equal_groups_give_equal_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1", [["a"]]), write(tmp_path / "2", [["a"]])
    assert one.contents == two.contents
    for name in ("groups-00000.parquet", "_embeddings-00000.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.98])
@pytest.mark.parametrize("name", ["groups-00001.parquet", "_embeddings-00001.safetensors"])
def test_truncated_file_is_named(tmp_path: Path, name: str, kept: float) -> None:
    write(tmp_path, [["a"], ["b"]])
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(UserError, match=name):
        GroupStore(tmp_path)
    with pytest.raises(UserError, match=name):
        GroupWriter(tmp_path).has_shard(1)


def test_damaged_embeddings_are_made_again_once_the_named_file_is_deleted(tmp_path: Path) -> None:
    write(tmp_path, [["a"], ["b"]])
    whole = (tmp_path / "_embeddings-00001.safetensors").read_bytes()
    (tmp_path / "_embeddings-00001.safetensors").write_bytes(whole[:-1])
    writer, parquet = GroupWriter(tmp_path), tmp_path / "groups-00001.parquet"
    with pytest.raises(UserError, match=r"expected the file written with groups-00001\.parquet$"):
        writer.has_shard(1)
    (tmp_path / "_sampling.json").write_text("{}")  # so it was gdro that made them
    with pytest.raises(UserError, match=re.escape(f"delete {parquet} and run")):
        writer.has_shard(1)
    parquet.unlink()
    assert not writer.has_shard(1)
    writer.write_shard(1, make_rows("b"), {"b": make_text("b")})
    assert GroupStore(tmp_path).group_ids == ["a", "b"]
    assert (tmp_path / "_embeddings-00001.safetensors").read_bytes() == whole


def test_flipped_byte_is_named(tmp_path: Path) -> None:
    """The footer is whole, so only the page's checksum can tell."""
    store = write(tmp_path, [["a"]])
    path = tmp_path / "groups-00000.parquet"
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"groups-00000.parquet is damaged"):
        store.images("a")


@pytest.mark.parametrize(("name", "place"), [("_embeddings-00000.safetensors", -1), ("groups-00000.parquet", -40)])
def test_a_bit_that_leaves_a_file_readable_is_named(tmp_path: Path, name: str, place: int) -> None:
    """One of an embedding, one of the footer's metadata."""
    write(tmp_path, [["a"]])
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        GroupStore(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no groups-\*.parquet"):
        GroupStore(tmp_path)
    write(tmp_path, [["a"], ["b"]])
    (tmp_path / "_embeddings-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"_embeddings-00001.safetensors not found"):
        GroupStore(tmp_path)
    (tmp_path / "groups-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"no groups-00000.parquet"):
        GroupStore(tmp_path)


def test_foreign_parquet_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"image_id": [1]}).to_parquet(tmp_path / "groups-00000.parquet")
    with pytest.raises(UserError, match=r"groups-00000.parquet is not a file of groups: column 'image_id'"):
        GroupStore(tmp_path)


def test_other_settings_and_doubled_groups_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [["a"]])
    writer = GroupWriter(tmp_path)
    writer.write_shard(1, [replace(row, guidance_scale=7.0) for row in make_rows("b")], {"b": make_text("b")})
    with pytest.raises(UserError, match=r"groups-00001.parquet was made with guidance_scale 7.0"):
        GroupStore(tmp_path)
    writer.write_shard(1, make_rows("a"), {"a": make_text("a")})
    with pytest.raises(UserError, match=r'groups-00001.parquet holds group "a"'):
        GroupStore(tmp_path)


def test_incomplete_group_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    writer = GroupWriter(tmp_path)
    with pytest.raises(ValueError, match="indices"):
        writer.write_shard(0, make_rows("a")[1:], {"a": make_text("a")})
    with pytest.raises(ValueError, match="with the text of"):
        writer.write_shard(0, make_rows("a"), {})
    with pytest.raises(ValueError, match="its row says"):
        writer.write_shard(0, [replace(make_rows("a")[0], width=8)], {"a": make_text("a")})
    assert not writer.has_shard(0)


FULL_DISK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store import make_rows, make_text
from gdro.groups.store import GroupWriter
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
GroupWriter(Path(sys.argv[1])).write_shard(0, make_rows("a", 9), {"a": make_text("a")})
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
@pytest.mark.parametrize(("limit", "named"), [(64, "_embeddings-00000.safetensors"), (2000, "groups-00000.parquet")])
def test_full_disk_leaves_the_old_file(tmp_path: Path, limit: int, named: str) -> None:
    """The system itself refuses the write, at the embeddings or only at the larger parquet file."""
    write(tmp_path, [["a"]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(Path(__file__).parent), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("gdro.common.errors.UserError")
    assert f"{named} could not be written" in last
    assert "File too large" in last
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after["groups-00000.parquet"] == before["groups-00000.parquet"]
    assert after.keys() == before.keys()
    assert len(GroupStore(tmp_path).images("a")) == 3
