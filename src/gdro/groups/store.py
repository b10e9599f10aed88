"""The store of groups: a folder of parquet files, each with its text embeddings beside it.

`groups-00000.parquet` holds whole groups, one row per image, one row group per group; `_embeddings-00000.safetensors`
holds the tensors `<group_id>/<name>` of each of its groups. If the images were sampled stochastically,
`_trajectories-00000.safetensors` holds their trajectories in the same way until they are discarded. Both are written
first, so a parquet file exists only if everything it refers to does.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from gdro.common.errors import UserError
from gdro.common.files import atomic_path, remake, write_bytes
from gdro.common.images import to_rgb
from gdro.common.prompts import Prompt
from gdro.common.reading import reading
from gdro.common.sealed import check_bytes, seal, unsealed
from gdro.groups.shard import SCHEMA, Shard, is_stochastic, read_images, read_rows, read_shard
from gdro.models.base import Text
from gdro.samplers.trajectory import Trajectory

EMPTIED = save({}, {"gdro": "discarded"})  # a file of discarded trajectories
PARTS = ("states", "log_probs", "times")


@dataclass(frozen=True)
class ImageRow:
    """One image of a group, its latent (tokens, channels), and everything needed to reproduce it.

    `seed`, `scheduler`, `num_inference_steps` and `sampler` are None for an imported image.
    """

    group_id: str
    index: int
    prompt: Prompt
    image: Image.Image
    latent: Tensor
    seed: int | None
    scheduler: str | None
    num_inference_steps: int | None
    guidance_scale: float
    max_sequence_length: int
    height: int
    width: int
    generator: str
    revision: str
    round: int
    sampler: str | None = None


class GroupWriter:
    """Writes a store file by file, each atomically. Several writers may write different files of one store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has_shard(self, i: int) -> bool:
        """Whether file i exists; UserError if it is damaged."""
        path = self.folder / groups_name(i)
        if not path.exists():
            return False
        check_shard(path)
        return True

    def write_shard(
        self,
        i: int,
        rows: Sequence[ImageRow],
        text: Mapping[str, Text],
        trajectories: Mapping[str, Trajectory] | None = None,
    ) -> None:
        """Write whole groups, each with its text embeddings (first axis 1) and, if sampled stochastically, trajectory.

        Raises ValueError if a group is incomplete or its images do not have the size in its rows, and UserError if the
        disk is full; an existing file then stays unchanged.
        """
        groups: dict[str, list[ImageRow]] = {}
        for row in rows:
            groups.setdefault(row.group_id, []).append(row)
        if set(groups) != set(text):
            raise ValueError(f"groups {sorted(groups)} came with the text of {sorted(text)}")
        if any(is_stochastic(row.sampler) != (trajectories is not None) for row in rows):
            raise ValueError(
                f"images of sampler {rows[0].sampler} came with{'out' * (trajectories is None)} trajectories"
            )
        if trajectories is not None:
            _check_trajectories(groups, trajectories)
        digest = hashlib.sha256()
        tables = []
        for group, members in groups.items():
            if [row.index for row in members] != list(range(len(members))):
                raise ValueError(f"group {group} has the indices {[row.index for row in members]}")
            tables.append(_table(members, f"{_embeddings_name(i)}#{group}", digest))
        tensors = {f"{group}/{name}": t.contiguous() for group, one in text.items() for name, t in one.items()}
        beside = {_embeddings_name(i): save(tensors)}
        if trajectories is not None:
            tensors = {f"{g}/{part}": getattr(t, part).contiguous() for g, t in trajectories.items() for part in PARTS}
            # groups of one round may share the tensor of times, which safetensors would refuse
            tensors |= {f"{g}/times": t.times.clone() for g, t in trajectories.items()}
            beside[_trajectories_name(i)] = save(tensors)
        for name, data in beside.items():
            write_bytes(self.folder / name, data)

        own = {
            "gdro.content": digest.hexdigest()[:16],
            "gdro.beside": json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in beside.items()}),
        }
        schema = SCHEMA.with_metadata({**SCHEMA.metadata, **own})
        names = [field.name for field in SCHEMA if pa.types.is_string(field.type)]
        with atomic_path(self.folder / groups_name(i)) as tmp:
            with pq.ParquetWriter(
                tmp, schema, use_dictionary=names, write_statistics=names, write_page_checksum=True
            ) as writer:
                writer.add_key_value_metadata(unsealed())
                for table in tables:
                    writer.write_table(table.cast(schema), row_group_size=len(table))
            seal(tmp)


class GroupStore:
    """Reads a store. Opening it checks every file; images, latents and embeddings are read on demand.

    Raises UserError naming the folder or file if it is missing, damaged, truncated, not part of a store, or made with
    settings that differ from the rest.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.folder = folder
        paths = sorted(folder.glob("groups-*.parquet"))
        if not paths:
            raise UserError(f"{folder} holds no groups-*.parquet; expected a store of groups")
        for i, path in enumerate(paths):
            if path.name != groups_name(i):
                raise UserError(f"{folder} has {path.name} but no {groups_name(i)}; expected every file of the store")
        self.shards: list[Shard] = [check_shard(path) for path in paths]
        self._places: dict[str, tuple[Shard, int]] = {}
        self.settings: dict[str, Any] = self.shards[0].settings
        for shard in self.shards:
            for name, value in shard.settings.items():
                if value != self.settings[name]:
                    raise UserError(
                        f"{shard.path} was made with {name} {value!r}, {self.shards[0].path.name} with "
                        f"{self.settings[name]!r}; expected one value throughout a store"
                    )
            for place, group in enumerate(shard.groups):
                if group in self._places:
                    raise UserError(f'{shard.path} holds group "{group}", which {self._places[group][0].path.name} has')
                self._places[group] = (shard, place)
        self.group_ids: list[str] = list(self._places)
        # at the time of opening: whether every group was sampled stochastically and still has its trajectory
        self.has_trajectories: bool = all(s.stochastic and not _discarded(s.path) for s in self.shards)

    @property
    def contents(self) -> dict[str, str]:
        """File name -> digest of its images; equal digests mean equal images."""
        return {shard.path.name: shard.content for shard in self.shards}

    def prompt(self, group_id: str) -> Prompt:
        """The group's prompt."""
        return self._places[group_id][0].prompts[group_id]

    def size(self, group_id: str) -> int:
        """How many images the group has (K)."""
        return self._places[group_id][0].groups[group_id]

    def image_size(self, group_id: str) -> tuple[int, int]:
        """(height, width) of the group's images, in pixels."""
        return self._places[group_id][0].sizes[group_id]

    def image_ids(self, group_id: str) -> list[str]:
        """`<group_id>/<index>` of each image, as in files of rewards."""
        return [f"{group_id}/{i}" for i in range(self.size(group_id))]

    def images(self, group_id: str) -> list[Image.Image]:
        """The group's K images, RGB."""
        shard, place = self._places[group_id]
        return read_images(shard.path, place)

    def latents(self, group_id: str) -> Tensor:
        """(K, tokens, channels), float32."""
        shard, place = self._places[group_id]
        table = read_rows(shard.path, place, ["latent", "latent_dtype", "latent_shape"])
        latents = []
        for row in table.to_pylist():
            expected = 4 * int(np.prod(row["latent_shape"]))
            if row["latent_dtype"] != "float32" or len(row["latent"]) != expected:
                raise UserError(
                    f"{shard.path} has a latent in {len(row['latent'])} bytes of {row['latent_dtype']}; "
                    f"expected {expected} of float32"
                )
            latents.append(np.frombuffer(row["latent"], "<f4").reshape(row["latent_shape"]))
        return torch.from_numpy(np.stack(latents))

    def text(self, group_id: str) -> Text:
        """The text embeddings the images were made with; first axis 1."""
        shard, _ = self._places[group_id]
        name, _, key = shard.text[group_id].partition("#")
        path = self.folder / name
        with reading(path, f'the text of group "{group_id}"'), safe_open(path, framework="pt") as file:
            return {full[len(key) + 1 :]: file.get_tensor(full) for full in sorted(file.keys()) if _owner(full) == key}

    def trajectory(self, group_id: str) -> Trajectory:
        """How the group's images were sampled. Raises UserError if the store holds no trajectories."""
        if not self.has_trajectories:
            raise UserError(
                f"{self.folder} holds no trajectories; expected groups made with sample.sampler flow_grpo, dance_grpo "
                "or flow_cps, whose trajectories were not discarded"
            )
        path = _trajectories_path(self._places[group_id][0].path)
        with reading(path, f'the trajectory of group "{group_id}"'), safe_open(path, framework="pt") as file:
            return Trajectory(*(file.get_tensor(f"{group_id}/{part}") for part in PARTS))


def discard_trajectories(folder: Path) -> None:
    """Empty a store's trajectory files, which are larger than its images; the groups and the store stay valid."""
    for path in sorted(folder.glob("_trajectories-*.safetensors")):
        write_bytes(path, EMPTIED)


def _check_trajectories(groups: Mapping[str, Sequence[ImageRow]], trajectories: Mapping[str, Trajectory]) -> None:
    """Raise ValueError if `trajectories` are not those of `groups`."""
    if set(groups) != set(trajectories):
        raise ValueError(f"groups {sorted(groups)} came with the trajectories of {sorted(trajectories)}")
    for group, found in trajectories.items():
        images, steps = len(groups[group]), len(found.times) - 1
        expected = (images, steps + 1, *groups[group][0].latent.shape), (images, steps), (steps + 1,)
        if tuple(tuple(getattr(found, part).shape) for part in PARTS) != expected:
            raise ValueError(f"the trajectory of group {group} is not of {images} images and {steps} steps")


def groups_name(i: int) -> str:
    """The name of the i-th file of groups."""
    return f"groups-{i:05d}.parquet"


def _embeddings_name(i: int) -> str:
    return f"_embeddings-{i:05d}.safetensors"


def _trajectories_name(i: int) -> str:
    return f"_trajectories-{i:05d}.safetensors"


def _trajectories_path(groups: Path) -> Path:
    """The trajectories of a parquet file's groups."""
    return groups.with_name(groups.name.replace("groups-", "_trajectories-").replace(".parquet", ".safetensors"))


def _discarded(groups: Path) -> bool:
    path = _trajectories_path(groups)
    return path.is_file() and path.stat().st_size == len(EMPTIED) and path.read_bytes() == EMPTIED


def _owner(key: str) -> str:
    """The group of a tensor `<group_id>/<name>`; group ids may contain slashes, names do not."""
    return key.rpartition("/")[0]


def check_shard(path: Path) -> Shard:
    """Check a parquet file, its text embeddings and, unless discarded, trajectories; UserError if one is damaged."""
    shard = read_shard(path)
    for name, digest in shard.beside.items():
        file = path.with_name(name)
        if name != _trajectories_path(path).name or not _discarded(path):
            again = remake(path, "run `gdro sample` (or `import`) again")
            check_bytes(file, digest, f"the file written with {path.name}{again}")
    return shard


def _table(rows: Sequence[ImageRow], text: str, digest: Any) -> pa.Table:
    columns: dict[str, list[Any]] = {field.name: [] for field in SCHEMA}
    for row in rows:
        if row.image.size != (row.width, row.height):
            raise ValueError(
                f"image {row.group_id}/{row.index} is {row.image.size}, its row says {row.width, row.height}"
            )
        png = io.BytesIO()
        # level 6, the default, takes twice as long, while the GPU waits, to save a tenth of the bytes
        to_rgb(row.image).save(png, "PNG", compress_level=1)
        latent = row.latent.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
        image_id = f"{row.group_id}/{row.index}"
        for part in (image_id.encode(), png.getvalue(), latent.tobytes()):
            digest.update(hashlib.sha256(part).digest())
        values: dict[str, Any] = {
            "image_id": image_id,
            "prompt_id": row.prompt.id,
            "prompt": row.prompt.text,
            "record": row.prompt.to_json(),
            "image": {"bytes": png.getvalue(), "path": None},
            "latent": latent.tobytes(),
            "latent_dtype": "float32",
            "latent_shape": list(latent.shape),
            "text": text,
        }
        for name, column in columns.items():
            column.append(values[name] if name in values else getattr(row, name))
    return pa.table(columns, schema=SCHEMA)
