"""Files of rewards: parquet, one row per image, one row group per file of groups.

The metadata holds the reward's name and version and the digest of every scored file of groups, so a file knows which
images its scores belong to.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from gdro.common.errors import UserError
from gdro.common.files import atomic_path
from gdro.common.reading import parse_json, reading
from gdro.common.sealed import check_footer, seal, unsealed
from gdro.rewards.base import Scores

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("group_id", pa.string()),
        ("reward", pa.string()),
        ("version", pa.string()),
        ("score", pa.float64()),
        ("evidence", pa.string()),
    ]
)


WHOLE = "a whole file of rewards, as `gdro score` writes it"


class Images(Protocol):
    """The part of a store of groups (`gdro.groups.store.GroupStore`) used here."""

    group_ids: list[str]

    @property
    def contents(self) -> dict[str, str]:
        """File of groups -> digest of its images."""

    def image_ids(self, group_id: str) -> list[str]:
        """Ids of the group's images, `<group>/<index>`."""


@dataclass(frozen=True)
class Header:
    """Metadata of a file of rewards; `contents`: file of groups -> digest of its images, in row group order."""

    name: str
    version: str
    contents: dict[str, str]


def rewards_table(header: Header, image_ids: Sequence[str], scores: Scores) -> pa.Table:
    """Rows for one file of groups, NaN (a missing score) as null. Raises ValueError for infinity or a wrong count."""
    values = np.asarray(scores.values, np.float64)
    if values.shape != (len(image_ids),) or len(scores.evidence) != len(image_ids) or np.isinf(values).any():
        raise ValueError(f"{len(image_ids)} images have {values.shape} scores, or one that is infinite")
    rows = len(image_ids)
    columns: dict[str, Any] = {
        "image_id": list(image_ids),
        "group_id": [image_id.rpartition("/")[0] for image_id in image_ids],
        "reward": [header.name] * rows,
        "version": [header.version] * rows,
        "score": pa.array(values, mask=np.isnan(values)),
        "evidence": [json.dumps(e, ensure_ascii=False) for e in scores.evidence],
    }
    return pa.table(columns, schema=SCHEMA)


def write_rewards(path: Path, header: Header, tables: Iterable[pa.Table]) -> None:
    """Write the file, atomically; `tables` in the order of `header.contents`, held in memory one at a time."""
    meta = {"name": header.name, "version": header.version, "contents": header.contents}
    schema = SCHEMA.with_metadata({"gdro.rewards": json.dumps(meta, ensure_ascii=False)})
    with atomic_path(path) as tmp:
        with pq.ParquetWriter(tmp, schema, write_page_checksum=True) as writer:
            writer.add_key_value_metadata(unsealed())
            for table in tables:
                writer.write_table(table.cast(schema), row_group_size=len(table))
        seal(tmp)


def read_header(path: Path) -> Header:
    """A file's metadata; UserError if it is missing, damaged, truncated or not a file of rewards."""
    with reading(path, WHOLE), pq.ParquetFile(path) as file:
        schema, row_groups = file.schema_arrow, file.num_row_groups
        if b"gdro.rewards" in (schema.metadata or {}):
            check_footer(path)
    meta = (schema.metadata or {}).get(b"gdro.rewards")
    if meta is None or not schema.equals(SCHEMA):
        raise UserError(f"{path} is not a file of rewards; expected the columns {', '.join(SCHEMA.names)}")
    with reading(path, WHOLE):
        header = Header(**parse_json(meta, f"{path}: metadata"))
    if len(header.contents) != row_groups:
        raise UserError(
            f"{path} holds {row_groups} row groups for {len(header.contents)} files of groups; it is damaged"
        )
    return header


def read_scored(path: Path, place: int) -> pa.Table:
    """The rows for the `place`-th entry of `read_header(path).contents`."""
    with reading(path, WHOLE), pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read_row_group(place)


def read_rewards(path: Path, store: Images) -> dict[str, Tensor]:
    """Group id -> (K,) float64 scores of `store`'s images, NaN for missing scores (null).

    Raises UserError if the file is damaged, belongs to other images, lacks an image, has one twice, or has a score that
    is not finite.
    """
    header = read_header(path)
    for name, content in header.contents.items():
        if name not in store.contents:
            raise UserError(f"{path} has rewards for {name}, which is not among the groups; run `gdro sample`")
        if store.contents[name] != content:
            raise UserError(f'{path} has rewards for a different {name}; score again ("gdro score")')
    scores: dict[str, float] = {}
    for place in range(len(header.contents)):
        table = read_scored(path, place)
        for image_id, score in zip(table["image_id"].to_pylist(), table["score"].to_pylist(), strict=True):
            if image_id in scores:
                raise UserError(f'{path} has two rewards for image "{image_id}"; expected one')
            if score is not None and not np.isfinite(score):
                raise UserError(f'{path} has the reward {score} for image "{image_id}"; expected a finite number')
            scores[image_id] = float("nan") if score is None else score
    rewards: dict[str, Tensor] = {}
    for group in store.group_ids:
        try:
            rewards[group] = torch.tensor([scores.pop(i) for i in store.image_ids(group)], dtype=torch.float64)
        except KeyError as error:
            raise UserError(f'{path} has no reward for image "{error.args[0]}"; score again ("gdro score")') from None
    if scores:
        raise UserError(f'{path} has a reward for image "{next(iter(scores))}", which is not among the groups')
    return rewards
