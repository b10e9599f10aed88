"""`gdro plan`: the cost of a run, as a table or as JSON."""

import json
import os
from collections.abc import Sequence

import torch

from gdro.common.errors import UserError
from gdro.runner.config import RunConfig
from gdro.runner.planning.gpus import Device, gpu, present
from gdro.runner.planning.plan import Plan, Stage, plan, to_json
from gdro.runner.planning.shapes import Shapes, largest_size, shapes_of
from gdro.runner.planning.timing import SMALL, measured_pace
from gdro.runner.prompt_sets import is_named, load_prompts


def plan_run(config: RunConfig, gpu_name: str | None, *, as_json: bool) -> str:
    """The plan of `config` on the GPU called `gpu_name`, "cpu", or (None) the device the run would use here."""
    prompts, notes = prompt_counts(config)
    device, here = _device(config, gpu_name)
    shapes = shapes_of(config, cuda=here is None or here.type == "cuda")
    pace = None
    if here is not None and shapes.transformer.parameters <= SMALL:
        pace = measured_pace(config, here)
        notes.append("seconds: this model's passes, timed here with random weights")
    else:
        notes.append(f"seconds: {device.assumed}")
    found = plan(config, shapes, device, prompts, pace)
    if config.compile or config.quantization:
        notes.append("seconds are for uncompiled passes with unquantized weights")
    if config.sample.buckets:
        notes.append("every image counts as one of the largest size")
    if as_json:
        return json.dumps({"model": config.model, "device": device.name, "notes": notes, **to_json(found)}, indent=2)
    return "\n".join(_lines(config, shapes, device, found, notes))


def _device(config: RunConfig, name: str | None) -> tuple[Device, torch.device | None]:
    """The device to plan for, and its torch device if it is the one at hand."""
    if name is not None and name != "cpu":
        return gpu(name), None
    cuda = torch.cuda.is_available() and name is None and config.device != "cpu"
    if not cuda and name is None and config.device == "cuda":
        raise UserError('device is "cuda", but torch finds no GPU here; expected --gpu NAME')
    here = torch.device("cuda" if cuda else "cpu")
    return present(here), here


def prompt_counts(config: RunConfig) -> tuple[dict[str, int | None], list[str]]:
    """How many prompts each split has, and a note for each file that does not exist yet."""
    specs = {
        "train": ("sample.prompts", config.sample.prompts),
        "validation": ("train.validation_prompts", config.train.validation_prompts if config.train.validates else None),
        "test": ("evaluate.prompts", config.evaluate.prompts),
    }
    counts: dict[str, int | None] = {}
    notes = []
    for split, (field, spec) in specs.items():
        counts[split] = None
        if spec is None:
            continue
        if is_named(spec) or os.path.exists(spec):
            counts[split] = len(load_prompts(spec, field))
        else:
            notes.append(f"{field}: {spec} does not exist yet, so the number of its prompts is unknown")
    return counts, notes


def _lines(config: RunConfig, shapes: Shapes, device: Device, found: Plan, notes: list[str]) -> list[str]:
    train, (height, width) = config.train, largest_size(config)
    tokens, channels = shapes.latent
    lines = [
        f"{config.model} ({shapes.family}) on {device.name}, {device.memory / 1e9:.0f} GB",
        f"parameters: {_count(shapes.transformer.parameters)} transformer, {_count(shapes.trainable)} trainable "
        f"(rank {train.rank}), {_count(shapes.text_encoders.parameters)} text encoders, "
        f"{_count(shapes.vae.parameters)} VAE",
        f"an image: {width}x{height}, {tokens} tokens of {channels} channels; a velocity "
        f"{_flops(shapes.base.flops)}, with its gradient {_flops(shapes.learning.flops)}, decoding "
        f"{_flops(shapes.decode.flops)}",
        "",
    ]
    rows: list[tuple[str, ...]] = [("stage", "images", "FLOP an image", "s an image", "images/s", "hours")]
    rows += [_row(stage) for stage in found.stages]
    rows.append(("all on the device", "", "", "", "", _hours(found.hours)))
    lines += [*_table(rows), *_per_prompt(found), ""]
    memory = [("memory", "GB")] + [(part, _gigabytes(size)) for part, size in found.memory.items()]
    for stage, need in found.totals.items():
        fits = "fits" if need <= device.memory else "DOES NOT FIT"
        memory.append((f"= {stage}, at its peak", f"{_gigabytes(need)}  {fits}"))
    disk = [("disk", "GB")] + [(part, _gigabytes(size)) for part, size in found.disk.items()]
    return [*lines, *_table(memory), "", *_table(disk), "", *found.advice, *notes]


def _per_prompt(found: Plan) -> list[str]:
    cost = found.nfe_per_prompt
    if cost is None:
        return []
    parts = ", ".join(f"{value:,.0f} {name}" for name, value in cost.items())
    return [f"model evaluations per training prompt: {sum(cost.values()):,.0f} ({parts})"]


def _row(stage: Stage) -> tuple[str, ...]:
    seconds = stage.seconds
    return (
        stage.name,
        "–" if stage.images is None else f"{stage.images:,}",
        "–" if stage.flops is None else _flops(stage.flops),
        "–" if seconds is None else f"{seconds:.3g}",
        "–" if seconds is None else f"{1 / seconds:.3g}",
        _hours(stage.hours),
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines with the first column left-aligned and the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _count(number: int) -> str:
    unit, name = (1e9, "B") if number >= 1e9 else (1e6, "M")
    return f"{number / unit:.4g} {name}"


def _flops(number: float) -> str:
    unit, name = (1e12, "TFLOP") if number >= 1e12 else (1e9, "GFLOP")
    return f"{number / unit:.3g} {name}"


def _gigabytes(size: float | None) -> str:
    return "–" if size is None else f"{size / 1e9:.3g}" if size < 1e9 else f"{size / 1e9:.1f}"


def _hours(hours: float | None) -> str:
    return "–" if hours is None else f"{hours:.3g}"
