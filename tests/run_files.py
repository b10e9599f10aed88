"""What a run directory holds, for comparing runs bit by bit."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    folder = out / "checkpoints" / f"step-{step:06d}"
    files = ((file.stem.partition("-")[0], file) for file in folder.glob("*.safetensors"))  # or each process's share
    return {f"{name}.{key}": v for name, file in files for key, v in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
