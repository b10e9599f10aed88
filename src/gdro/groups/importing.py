"""Groups from a folder of images made elsewhere, with their rewards.

`metadata.jsonl` in the folder has one row per image: `file_name` (relative to the folder), `prompt`, `reward` (a
number) and `group` (shared by the images of one prompt that are compared). Other keys go into the prompt's record; they
and the prompt must be the same throughout a group.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gdro.common.errors import UserError
from gdro.common.files import fingerprint, sweep
from gdro.common.images import open_image, path_inside
from gdro.common.progress import Progress
from gdro.common.prompts import Prompt
from gdro.common.reading import parse_json, read_lines
from gdro.common.sealed import read_record, write_record
from gdro.common.validation import show
from gdro.groups.scores import Header, rewards_table, write_rewards
from gdro.groups.store import GroupStore, GroupWriter, ImageRow
from gdro.models.base import FlowModel
from gdro.models.finite import check_rows, naming
from gdro.rewards.base import Scores

BEGUN = "_importing.json"
GROUPS_PER_SHARD = 16
SHOWN = 3  # mistakes reported in full


@dataclass(frozen=True)
class Row:
    """One line of metadata.jsonl."""

    where: str  # file:line
    path: Path
    name: str  # its file_name
    size: tuple[int, int]  # width and height
    reward: float
    prompt: Prompt  # its id is the group's


def import_folder(
    members: Mapping[str, Sequence[Row]],
    model: FlowModel,
    groups: Path,
    rewards: Path,
    *,
    guidance_scale: float,
    max_sequence_length: int,
    reward_name: str = "imported",
) -> Path:
    """Make the store `groups` and `rewards/<reward_name>.parquet` from `read_metadata`'s rows; returns the latter.

    Latents and text embeddings are `model`'s; `guidance_scale` and `max_sequence_length` are those for training.
    Resumes where it stopped.
    """
    for width, height in {rows[0].size for rows in members.values()}:
        model.latent_shape(height, width)
    begun: dict[str, Any] = {
        "metadata": fingerprint([[r.name, r.reward, r.prompt.to_json()] for rows in members.values() for r in rows]),
        "guidance_scale": guidance_scale,
        "max_sequence_length": max_sequence_length,
        "revision": model.fingerprint,
        "files": len(range(0, len(members), GROUPS_PER_SHARD)),
    }
    _begin(groups, begun)

    ids = list(members)
    sweep(groups)
    writer = GroupWriter(groups)
    shards = [ids[start : start + GROUPS_PER_SHARD] for start in range(0, len(ids), GROUPS_PER_SHARD)]
    left = [i for i in range(len(shards)) if not writer.has_shard(i)]
    total = sum(map(len, members.values()))
    done = total - sum(len(members[group]) for i in left for group in shards[i])
    with Progress("import", total, "img", done) as progress:
        for i in left:
            rows, text = [], {}
            for group in shards[i]:
                images = [open_image(row.path, f"{row.where}: {row.path}") for row in members[group]]
                with naming(model.name, [str(row.path) for row in members[group]]):
                    text[group] = model.encode_text([members[group][0].prompt.text], max_sequence_length)
                    for name, value in text[group].items():
                        check_rows(f"the {name} of the text encoders", value)
                    latents = model.encode_images(images).cpu()
                for index, (image, latent) in enumerate(zip(images, latents, strict=True)):
                    row = ImageRow(
                        group_id=group,
                        index=index,
                        prompt=members[group][index].prompt,
                        image=image,
                        latent=latent,
                        seed=None,
                        scheduler=None,
                        num_inference_steps=None,
                        guidance_scale=guidance_scale,
                        max_sequence_length=max_sequence_length,
                        height=image.height,
                        width=image.width,
                        generator=model.name,
                        revision=model.fingerprint,
                        round=0,
                    )
                    rows.append(row)
                progress.advance(len(images))
            writer.write_shard(i, rows, text)

    store = GroupStore(groups)
    header = Header(reward_name, begun["metadata"], store.contents)
    path = rewards / f"{reward_name}.parquet"
    tables = []
    for shard in store.shards:
        scored = [row.reward for group in shard.groups for row in members[group]]
        image_ids = [image_id for group in shard.groups for image_id in store.image_ids(group)]
        tables.append(rewards_table(header, image_ids, Scores(np.array(scored), [{} for _ in scored])))
    write_rewards(path, header, tables)
    return path


def read_metadata(folder: Path) -> dict[str, list[Row]]:
    """Group id -> its rows, after checking all of them and opening every image once.

    Raises UserError naming the line of the first SHOWN mistakes in the folder: a bad row, an image that is missing,
    damaged or of a different size than its group's first, a group of one image.
    """
    path = folder / "metadata.jsonl"
    mistakes: list[str] = []
    groups: dict[str, list[Row]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    seen: dict[Path, str] = {}
    for number, line in read_lines(path, "one JSON object per image: file_name, prompt, reward, group"):
        try:
            row = _parse(line, f"{path}:{number}", folder)
            if row.path in seen:
                raise UserError(f"{row.where} names {row.path.name} again, after {seen[row.path]}")
            seen[row.path] = row.where
            members = groups.setdefault(row.prompt.id, [])
            expected = sizes.setdefault(row.prompt.id, row.size)
            if row.size != expected:
                raise UserError(
                    f"{row.where}: {row.path.name} is {row.size[0]}x{row.size[1]}; the first of group "
                    f'"{row.prompt.id}" is {expected[0]}x{expected[1]}'
                )
            if members and members[0].prompt != row.prompt:
                raise UserError(
                    f'{row.where}: group "{row.prompt.id}" has another prompt or record than at {members[0].where}; '
                    "expected the same throughout a group"
                )
            members.append(row)
        except UserError as error:
            mistakes.append(str(error))
    for group, members in groups.items():
        if len(members) == 1 and not mistakes:
            mistakes.append(f'{members[0].where}: group "{group}" has one image; expected at least two to compare')
    if mistakes:
        rest = f"; and {len(mistakes) - SHOWN} more mistakes in {path}" if len(mistakes) > SHOWN else ""
        raise UserError("; also ".join(mistakes[:SHOWN]) + rest)
    if not groups:
        raise UserError(f"{path} has no rows; expected one JSON object per image")
    return groups


def _parse(line: str, where: str, folder: Path) -> Row:
    row = parse_json(line, where, "a JSON object")
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}; expected an object")
    for key in ("file_name", "prompt", "reward", "group"):
        if key not in row:
            raise UserError(f'{where} has no "{key}"; expected file_name, prompt, reward and group')
    name, prompt, reward, group = (row.pop(key) for key in ("file_name", "prompt", "reward", "group"))
    for key, value in (("file_name", name), ("prompt", prompt)):
        if not isinstance(value, str) or not value.strip():
            raise UserError(f'{where} has "{key}" {show(value)}; expected text')
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise UserError(f'{where} has "reward" {show(reward)}; expected a finite number')
    if isinstance(group, bool) or not isinstance(group, str | int) or str(group) == "":
        raise UserError(f'{where} has "group" {show(group)}; expected a string or an integer')
    if "id" in row:
        raise UserError(f'{where} has "id" {show(row["id"])}; expected the group\'s id only in "group"')
    path = path_inside(folder, name)
    if path is None:
        raise UserError(f'{where} has "file_name" {show(name)}; expected a file inside the folder')
    size = open_image(path, f"{where}: {path}").size
    return Row(where, path, name, size, float(reward), Prompt(str(group), prompt, row))


def _begin(groups: Path, begun: dict[str, Any]) -> None:
    """Record what the store is made from; refuse a store made from something else."""
    path = groups / BEGUN
    if groups.is_dir() and any(groups.glob("*.parquet")):  # otherwise it is empty and may be started over
        if not path.exists():
            raise UserError(f"{groups} holds groups of another origin; expected an empty or new folder")
        before = read_record(path)
        for field, value in begun.items():
            if before.get(field) != value:
                raise UserError(
                    f"{groups} was imported with {field} {before.get(field)!r}, now {value!r}; expected another folder"
                )
    write_record(path, begun)
