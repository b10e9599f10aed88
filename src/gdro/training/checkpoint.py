"""Checkpoints: one folder each, safetensors and JSON, either complete or absent.

`step-NNNNNN/` holds `adapter`, `ema` and `optimizer` safetensors, with `train.reference_draws` also `reference`, and
`state.json`: the step, digests of the other files, the settings of the run, and what the loop must remember. There is
no RNG state: draws are counter-based. Each of n processes writes its share of the tensors, `adapter-00001-of-0000n` and
so on; any number of processes can read them all.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor

from gdro.common import distributed
from gdro.common.errors import UserError
from gdro.common.files import discard, remake, sync_folder, write_bytes
from gdro.common.reading import read_bytes
from gdro.common.sealed import find_record, parse_record, write_record
from gdro.training.config import TrainConfig

FIELD = "train.resume_from_checkpoint"
PREFIX = "step-"
TENSORS = ("adapter", "ema", "optimizer", "reference")
OPTIONAL = {"reference"}


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, as read from disk; tensors by name, on the CPU."""

    path: Path
    step: int
    settings: dict[str, Any]
    memory: dict[str, Any]  # what the loop remembers: its best validation, the alarm's window
    adapter: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    reference: dict[str, Tensor]  # the reference errors known so far; empty if none are kept


def steps_saved(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, ascending."""
    names = (path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint at `step`, whether or not it exists."""
    return folder / f"{PREFIX}{step:06d}"


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    adapter: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    reference: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any],
    memory: Mapping[str, Any],
) -> Path:
    """Write everything to a hidden folder, sync it and rename it; all processes must call this. Returns its path.

    Raises UserError if writing fails (full disk); existing checkpoints stay.
    """
    path = checkpoint_path(folder, step)
    tmp = folder / f".{path.name}.tmp"
    first, place = distributed.is_first(), f"-{distributed.rank() + 1:05d}-of-{distributed.size():05d}"
    try:
        if first:
            discard(tmp)
            tmp.mkdir(parents=True)
        distributed.wait()
        digests = {}
        for name, tensors in zip(TENSORS, (adapter, ema, optimizer, reference), strict=True):
            if tensors is None:
                continue
            shared = distributed.mine(sorted(tensors))  # all processes need the same order
            own = {key: tensors[key].detach().cpu().contiguous() for key in shared}
            file, data = name + place * (distributed.size() > 1), safetensors.save(own)
            digests[file] = hashlib.sha256(data).hexdigest()
            write_bytes(tmp / f"{file}.safetensors", data)
        digests = {file: digest for one in distributed.gather(digests) for file, digest in one.items()}
        if first:
            state = {"step": step, "settings": dict(settings), "memory": dict(memory), "sha256": digests}
            write_record(tmp / "state.json", state)
            discard(path)
            os.rename(tmp, path)
            sync_folder(folder)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}; nothing was changed") from error
    finally:
        if first:
            shutil.rmtree(tmp, ignore_errors=True)
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint. Raises UserError naming any file that is missing or damaged."""
    if not os.path.isdir(path):
        raise UserError(f"{FIELD}: {path} not found; expected a checkpoint folder")
    held = {file.name.partition(".")[0].partition("-")[0] for file in path.iterdir()}
    if not re.fullmatch(rf"{PREFIX}\d{{6,}}", path.absolute().name) or not held & {"state", "ema", "optimizer"}:
        raise UserError(f"{FIELD}: {path} is not a gdro checkpoint; expected a run's folder {PREFIX}NNNNNN")
    data = read_bytes(path / "state.json", "a checkpoint's state", f"{FIELD}: {path / 'state.json'}")
    try:
        state = parse_record(data)
        digests = {path / f"{file}.safetensors": digest for file, digest in state["sha256"].items()}
        named = {file.stem.partition("-")[0] for file in digests}
        if named | OPTIONAL != set(TENSORS):
            raise ValueError(f"it names {', '.join(sorted(named))}")
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in TENSORS}
        step, settings, memory = int(state["step"]), dict(state["settings"]), dict(state["memory"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(_damaged(path / "state.json", error)) from None
    for file, digest in digests.items():
        try:
            data = read_bytes(file, "a file that state.json lists")
        except UserError as error:
            raise UserError(_damaged(file, error)) from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(_damaged(file, "its bytes were altered"))
        tensors[file.stem.partition("-")[0]] |= safetensors.load(data)
    return Checkpoint(path, step, settings, memory, **tensors)


def find_checkpoint(folder: Path, resume: str | None, max_train_steps: int) -> Checkpoint | None:
    """The checkpoint to resume from: the latest in `folder` ("latest"), the folder `resume`, or None.

    Raises UserError if it is missing or damaged, is past `max_train_steps`, or if `resume` is None but `folder` holds
    checkpoints.
    """
    saved = steps_saved(folder)
    if resume is None:
        if saved:
            raise UserError(f"{FIELD}: null, but {folder} holds {checkpoint_path(folder, saved[-1]).name}; set latest")
        return None
    if resume == "latest" and not saved:
        return None
    checkpoint = load_checkpoint(checkpoint_path(folder, saved[-1]) if resume == "latest" else Path(resume))
    if checkpoint.step > max_train_steps:
        raise UserError(f"train.max_train_steps: {max_train_steps}, but {checkpoint.path} is past it")
    return checkpoint


def check_settings(checkpoint: Checkpoint, settings: Mapping[str, Any], free: frozenset[str]) -> None:
    """Raise UserError naming the first field that differs from the checkpoint; fields in `free` may change."""
    for field in sorted((checkpoint.settings.keys() | settings.keys()) - free):
        old, new = checkpoint.settings.get(field), settings.get(field)
        if old != new:
            raise UserError(
                f"{field}: {new!r}, but {checkpoint.path} was made with {old!r}; "
                "to resume, keep it; for another value, use a new output folder"
            )


def mark_best(folder: Path, best: Mapping[str, Any] | None) -> None:
    """Record the best checkpoint ("step") and its validation in best.json; with None, remove that file.

    Called before the checkpoint itself is written, so a finished run never lacks it.
    """
    if best is None:
        (folder / "best.json").unlink(missing_ok=True)
    else:
        write_record(folder / "best.json", best)


def mark_stopped(folder: Path, step: int, reason: str, config: TrainConfig) -> None:
    """Record in stopped.json that training is over: at which step, why, and under which limits.

    Called before the checkpoint itself is written, so a run that has its last step always knows it.
    """
    write_record(folder / "stopped.json", {"step": step, "reason": reason, **_limits(config)})


def stopped_at(folder: Path, config: TrainConfig) -> int | None:
    """The step at which training ended under the limits of `config`; None if it has not ended or they changed."""
    stopped = find_record(folder / "stopped.json")
    if stopped is None:
        return None
    under = {name: stopped.get(name) for name in _limits(config)}
    return int(stopped["step"]) if under == _limits(config) and stopped["step"] in steps_saved(folder) else None


def _limits(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(include={"max_train_steps", "max_nfe", "target_reward"})


def prune_checkpoints(folder: Path, *, limit: int | None, needed: Collection[int | None]) -> None:
    """Delete the oldest checkpoints until `limit` are left, but keep the `needed` steps; None deletes nothing."""
    steps = steps_saved(folder)
    spare = [step for step in steps if step not in needed]
    for step in spare[: max(0, len(steps) - limit)] if limit else []:
        if step != steps[-1]:
            discard(checkpoint_path(folder, step))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """AdamW's state as `<parameter>/<exp_avg|exp_avg_sq|step>`; `names` in the optimizer's order."""
    state = optimizer.state_dict()["state"]
    return {f"{names[index]}/{key}": value for index, entry in state.items() for key, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Restore the tensors from `optimizer_tensors`; the optimizer keeps its own hyperparameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        # AdamW keeps the tensors it is given, and its state must not be a view of the file's buffer.
        state.setdefault(names.index(name), {})[entry] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _damaged(path: Path, cause: object) -> str:
    earlier = remake(path.parent, "resume from an earlier one")
    return f"{FIELD}: {path} is damaged ({cause}); expected a whole checkpoint{earlier}"
