"""What a run directory holds, for comparing runs bit by bit."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gdro.common.sealed import DIGEST, row_digest
from gdro.training.log import read_metrics


def rows(out: Path) -> list[dict[str, Any]]:
    return read_metrics(out / "metrics.jsonl")


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    folder = out / "checkpoints" / f"step-{step:06d}"
    files = ((file.stem.partition("-")[0], file) for file in folder.glob("*.safetensors"))  # or each process's share
    return {f"{name}.{key}": v for name, file in files for key, v in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def write_metrics(path: Path, rows: Sequence[Mapping[str, Any]], tail: str = "") -> None:
    """A log of rows, and what a kill may have left behind them."""
    lines = [json.dumps(row | {DIGEST: row_digest(row)}) + "\n" for row in map(dict, rows)]
    path.write_text("".join(lines) + tail)
