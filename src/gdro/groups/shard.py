"""One parquet file of the store of groups: its schema, its checks, its images. Needs no torch.

A row is an image and a row group is a group, so a group is read without touching its neighbors. Pages have checksums,
the footer is sealed (`gdro.common.sealed`), and its metadata hold digests of the images, which tie rewards to them, and
of every file beside it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.files import remake
from gdro.common.images import open_image
from gdro.common.prompts import Prompt
from gdro.common.reading import parse_json, reading
from gdro.common.sealed import check_footer

SETTINGS = ("guidance_scale", "max_sequence_length", "generator", "revision")
"""Columns with one value throughout a store; training must use the same."""
AXES = ["height", "width"]  # columns with one value throughout a group

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_FIELDS: list[tuple[str, pa.DataType]] = [
    ("image_id", pa.string()),
    ("group_id", pa.string()),
    ("index", pa.int64()),
    ("prompt_id", pa.string()),
    ("prompt", pa.string()),
    ("record", pa.string()),
    ("image", _IMAGE),
    ("latent", pa.binary()),
    ("latent_dtype", pa.string()),
    ("latent_shape", pa.list_(pa.int64())),
    ("text", pa.string()),
    ("seed", pa.int64()),
    ("scheduler", pa.string()),
    ("sampler", pa.string()),
    ("num_inference_steps", pa.int64()),
    ("guidance_scale", pa.float64()),
    ("max_sequence_length", pa.int64()),
    ("height", pa.int64()),
    ("width", pa.int64()),
    ("generator", pa.string()),
    ("revision", pa.string()),
    ("round", pa.int64()),
]


def _huggingface() -> str:
    """The features that tell `datasets` that the column `image` holds images."""
    features: dict[str, Any] = {}
    for name, kind in _FIELDS:
        if name == "image":
            features[name] = {"_type": "Image"}
        elif pa.types.is_list(kind):
            features[name] = {"_type": "List", "feature": {"dtype": "int64", "_type": "Value"}}
        else:
            features[name] = {"dtype": {"double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}
    return json.dumps({"info": {"features": features}})


SCHEMA = pa.schema(_FIELDS, metadata={"huggingface": _huggingface()})


@dataclass(frozen=True)
class Shard:
    """What the store keeps in memory about a checked file."""

    path: Path
    content: str  # digest of its images and latents
    beside: dict[str, str]  # companion file (text embeddings, trajectories) -> digest of its bytes
    groups: dict[str, int]  # group id -> number of images; the n-th group is the n-th row group
    prompts: dict[str, Prompt]
    sizes: dict[str, tuple[int, int]]  # group id -> height and width of its images
    settings: dict[str, Any]
    text: dict[str, str]  # group id -> "file#key" of its text embeddings
    sampler: str | None  # None: images made elsewhere

    @property
    def stochastic(self) -> bool:
        """Whether its groups have trajectories."""
        return is_stochastic(self.sampler)


def is_stochastic(sampler: str | None) -> bool:
    """Whether the sampling steps were stochastic; then each group has a trajectory."""
    return sampler not in (None, "ode")


def whole(path: Path) -> str:
    """For error messages: what is expected of a file of groups."""
    return "a whole file, as gdro wrote it" + remake(path, "run `gdro sample` (or `import`) again")


def open_parquet(path: Path) -> pq.ParquetFile:
    """The file, memory-mapped, footer read, page checksums enabled; call it within `reading`."""
    return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)


def read_shard(path: Path) -> Shard:
    """Check a file's footer, schema and index. Raises UserError naming the file and what is wrong in it."""
    light = ["image_id", "group_id", "index", "prompt_id", "record", "text", "sampler", *AXES, *SETTINGS]
    with reading(path, whole(path)), open_parquet(path) as file:
        schema = file.schema_arrow
        if not schema.equals(SCHEMA):
            wrong = [f.name for f in SCHEMA if f.name not in schema.names or not schema.field(f.name).equals(f)]
            found = f"column {wrong[0]!r} is missing or of another type" if wrong else "there are other columns too"
            raise UserError(f"{path} is not a file of groups: {found}; expected the columns of gdro's store")
        check_footer(path)
        metadata = schema.metadata or {}
        content, beside = metadata[b"gdro.content"].decode(), json.loads(metadata[b"gdro.beside"])
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        table = file.read(columns=light)
    groups: dict[str, int] = {}
    prompts: dict[str, Prompt] = {}
    images: dict[str, tuple[int, int]] = {}
    text: dict[str, str] = {}
    start = 0
    for size in sizes:
        rows = table.slice(start, size).select(["image_id", "group_id", "index"]).to_pylist()
        first = {name: table[name][start].as_py() for name in ("group_id", "record", "text")}
        group = first["group_id"]
        expected = [{"image_id": f"{group}/{i}", "group_id": group, "index": i} for i in range(size)]
        if rows != expected or group in groups:
            raise UserError(f'{path} does not hold group "{group}" exactly once, complete and in order')
        measured = {(row["height"], row["width"]) for row in table.slice(start, size).select(AXES).to_pylist()}
        if len(measured) > 1:
            told = " and ".join(f"{width}x{height}" for height, width in sorted(measured))
            raise UserError(f'{path} has images of {told} in group "{group}"; expected one size throughout a group')
        groups[group], text[group], images[group] = size, first["text"], measured.pop()
        record = parse_json(first["record"], f'{path}: record of group "{group}"', "a prompt's record")
        prompts[group] = Prompt(record.pop("id"), record.pop("prompt"), record)
        start += size
    if not groups:
        raise UserError(f"{path} holds no groups; expected at least one")
    settings = {}
    for name in ("sampler", *SETTINGS):
        values = table[name].unique().to_pylist()
        if len(values) != 1:
            raise UserError(f"{path} has several values of {name} ({values[0]!r}, {values[1]!r}); expected one")
        settings[name] = values[0]
    sampler = settings.pop("sampler")
    return Shard(path, content, beside, groups, prompts, images, settings, text, sampler)


def read_rows(path: Path, place: int, columns: Sequence[str]) -> pa.Table:
    """The chosen columns of the `place`-th group of a file."""
    with reading(path, whole(path)), open_parquet(path) as file:
        return file.read_row_group(place, columns=list(columns))


def read_images(path: Path, place: int) -> list[Image.Image]:
    """The images (RGB) of the `place`-th group of a file."""
    with reading(path, whole(path)):
        rows = read_rows(path, place, ["image_id", "image"]).to_pylist()
    return [open_image(row["image"]["bytes"], f'{path}: image "{row["image_id"]}"') for row in rows]


@dataclass(frozen=True)
class Piece:
    """Consecutive groups of a file: small enough to send to another process, which loads their images."""

    shard: Path
    places: range
    groups: dict[str, int]
    prompts: list[Prompt]  # one per group

    def image_ids(self) -> list[str]:
        """Ids of its images, `<group>/<index>`."""
        return [f"{group}/{i}" for group, size in self.groups.items() for i in range(size)]

    def load(self) -> tuple[list[str], list[Image.Image], list[Prompt]]:
        """(image ids, images, each image's prompt)."""
        images = [image for place in self.places for image in read_images(self.shard, place)]
        sizes = self.groups.values()
        return self.image_ids(), images, [p for p, size in zip(self.prompts, sizes, strict=True) for _ in range(size)]


def pieces(shard: Shard, images: int) -> Iterator[Piece]:
    """A file's groups in runs of at most `images` images, but at least one group."""
    ids = list(shard.groups)
    start = 0
    while start < len(ids):
        stop, count = start + 1, shard.groups[ids[start]]
        while stop < len(ids) and count + shard.groups[ids[stop]] <= images:
            count += shard.groups[ids[stop]]
            stop += 1
        part = ids[start:stop]
        yield Piece(
            shard.path, range(start, stop), {i: shard.groups[i] for i in part}, [shard.prompts[i] for i in part]
        )
        start = stop
