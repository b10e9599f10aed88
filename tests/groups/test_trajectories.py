"""Trajectories beside a shard: what goes in comes out, what is not there or damaged is named, and they can go."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load, save
from test_store import make_rows, make_text, write

from gdro.common.errors import UserError
from gdro.groups.store import GroupStore, GroupWriter, ImageRow, discard_trajectories
from gdro.samplers.trajectory import Trajectory

TIMES = torch.tensor([0.9, 0.6, 0.3])  # one tensor for all groups, as in a round
SECOND = "_trajectories-00001.safetensors"


def make_path(group: str, images: int = 3, steps: int = 2) -> Trajectory:
    generator = torch.Generator().manual_seed(len(group))
    return Trajectory(
        torch.randn(images, steps + 1, 2, 4, generator=generator),
        torch.randn(images, steps, generator=generator),
        TIMES[: steps + 1],
    )


def rows(group: str) -> list[ImageRow]:
    return [replace(row, sampler="flow_grpo") for row in make_rows(group)]


def write_sampled(folder: Path, shards: list[list[str]], first: int = 0) -> GroupStore:
    writer = GroupWriter(folder)
    for i, groups in enumerate(shards, first):
        texts, paths = {g: make_text(g) for g in groups}, {g: make_path(g) for g in groups}
        writer.write_shard(i, [r for g in groups for r in rows(g)], texts, paths)
    return GroupStore(folder)


def test_round_trip(tmp_path: Path) -> None:
    """Also ids that share a prefix, and one with a slash."""
    store = write_sampled(tmp_path, [["a", "a/b"], ["c@1"]])
    assert store.has_trajectories
    for group in store.group_ids:
        found, expected = store.trajectory(group), make_path(group)
        for part in ("states", "log_probs", "times"):
            assert torch.equal(getattr(found, part), getattr(expected, part))
    assert set(pd.read_parquet(tmp_path / "groups-00000.parquet")["sampler"]) == {"flow_grpo"}


def test_a_store_without_says_what_makes_them(tmp_path: Path) -> None:
    """Imported images (no sampler), and a store of which one file was not sampled stochastically."""
    store = write(tmp_path / "imported", [["a"]])
    assert not store.has_trajectories
    with pytest.raises(
        UserError, match=r"imported holds no trajectories; expected groups made with sample.sampler flow"
    ):
        store.trajectory("a")
    assert pd.read_parquet(tmp_path / "imported" / "groups-00000.parquet")["sampler"].isna().all()
    write_sampled(tmp_path / "mixed", [["a"]])
    GroupWriter(tmp_path / "mixed").write_shard(1, make_rows("b"), {"b": make_text("b")})
    assert not GroupStore(tmp_path / "mixed").has_trajectories


@pytest.mark.parametrize("kept", [None, 0.0, 0.3, 0.98])
def test_missing_and_truncated_files_are_named(tmp_path: Path, kept: float | None) -> None:
    write_sampled(tmp_path, [["a"], ["b"]])
    data = (tmp_path / SECOND).read_bytes()
    if kept is None:
        (tmp_path / SECOND).unlink()
    else:
        (tmp_path / SECOND).write_bytes(data[: int(kept * len(data))])
    for reader in (lambda: GroupStore(tmp_path), lambda: GroupWriter(tmp_path).has_shard(1)):
        with pytest.raises(
            UserError, match=rf"{SECOND} (not found|is damaged).*the file written with groups-00001.parquet"
        ):
            reader()
    (tmp_path / "groups-00001.parquet").unlink()  # as the message says
    assert not GroupWriter(tmp_path).has_shard(1)
    write_sampled(tmp_path, [["b"]], first=1)
    assert (tmp_path / SECOND).read_bytes() == data


def test_a_group_or_part_that_is_not_there_is_named(tmp_path: Path) -> None:
    store = write_sampled(tmp_path, [["a"], ["b", "c"]])
    tensors = load((tmp_path / SECOND).read_bytes())
    for name in ("c/times", "c/states"):
        changed = {key: value + (key == name) for key, value in tensors.items()}
        for other in (changed, {key: value for key, value in tensors.items() if key != name}):
            (tmp_path / SECOND).write_bytes(save(other))
            with pytest.raises(UserError, match=rf"{SECOND} is damaged: its bytes were altered"):
                GroupStore(tmp_path)
    (tmp_path / SECOND).unlink()
    with pytest.raises(UserError, match=rf"{SECOND} not found"):
        store.trajectory("b")


def test_discarded(tmp_path: Path) -> None:
    """The files are emptied, images and text stay; interrupted between two files it is a valid store as well."""
    write_sampled(tmp_path, [["a"], ["b"]])
    whole = (tmp_path / SECOND).read_bytes()
    discard_trajectories(tmp_path)
    assert len((tmp_path / SECOND).read_bytes()) < 100
    store = GroupStore(tmp_path)
    assert not store.has_trajectories
    assert GroupWriter(tmp_path).has_shard(1)
    assert len(store.images("a")) == 3
    with pytest.raises(UserError, match=r"holds no trajectories; .* not discarded"):
        store.trajectory("a")
    discard_trajectories(tmp_path)
    (tmp_path / SECOND).write_bytes(whole)
    assert not GroupStore(tmp_path).has_trajectories
    assert write_sampled(tmp_path, [["a"], ["b"]]).has_trajectories, "written anew they are there again"


def test_a_store_without_any_has_nothing_to_discard(tmp_path: Path) -> None:
    write(tmp_path, [["a"]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    discard_trajectories(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_trajectories_that_do_not_belong_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    writer, text = GroupWriter(tmp_path), {"a": make_text("a")}
    with pytest.raises(ValueError, match="sampler flow_grpo came without trajectories"):
        writer.write_shard(0, rows("a"), text)
    with pytest.raises(ValueError, match="sampler None came with trajectories"):
        writer.write_shard(0, make_rows("a"), text, {"a": make_path("a")})
    with pytest.raises(ValueError, match="the trajectories of"):
        writer.write_shard(0, rows("a"), text, {"b": make_path("b")})
    with pytest.raises(ValueError, match="not of 3 images and 2 steps"):
        writer.write_shard(0, rows("a"), text, {"a": make_path("a", images=2)})
    assert not list(tmp_path.iterdir())
