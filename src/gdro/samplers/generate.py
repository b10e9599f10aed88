"""Groups of images of prompts, written shard by shard into a store; shared by sampling and evaluation."""

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gdro.errors import UserError
from gdro.files import fingerprint, write_json
from gdro.groups.store import GroupWriter, ImageRow
from gdro.models.base import FlowModel, Text
from gdro.progress import Progress
from gdro.prompts import Prompt, check_unique_ids
from gdro.rng import torch_rng
from gdro.samplers.ode import generate
from gdro.samplers.schedulers import SchedulerName

STARTED = "_sampling.json"


class Generation(BaseModel):
    """How images are generated. Everything but `batch_size` is part of what a store of groups is."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    images_per_prompt: int = Field(16, ge=1, description="Images of one prompt: the group's size K.")
    num_inference_steps: int = Field(28, ge=1, description="Steps of the solver from noise to image.")
    guidance_scale: float = Field(3.5, ge=0, description="Guidance given to a guidance-embedded model.")
    max_sequence_length: int = Field(512, ge=1, le=512, description="Tokens of the (T5) text embedding.")
    height: int = Field(512, ge=1, description="Height of the images in pixels.")
    width: int = Field(512, ge=1, description="Width of the images in pixels.")
    scheduler: SchedulerName = Field(
        "FlowMatchEulerDiscreteScheduler", description="A deterministic flow scheduler of diffusers."
    )
    batch_size: int = Field(16, ge=1, description="Images generated at once; more is faster until memory runs out.")
    prompts_per_shard: int = Field(16, ge=1, description="Prompts of one file; an interruption loses at most one file.")


def sample_groups(
    settings: Generation,
    model: FlowModel,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    seed: int,
    purpose: str = "noise",
    round: int = 0,
    label: str = "sample",
) -> None:
    """Fill the store in `folder` with `settings.images_per_prompt` images of every prompt; going on where it stopped.

    The noise of an image is a function of (seed, purpose, group, index), and a batch never crosses a shard: an
    interrupted job ends with the same bits, and another batch size or order of prompts changes rounding only. The same
    store may be extended by appending prompts. Raises UserError, naming `label`'s field, if the store was begun with
    other settings, prompts or weights, or if a setting does not suit the model.
    """
    if not prompts:
        raise UserError(f"{label}.prompts: no prompt given; expected at least one")
    check_unique_ids(prompts, f"{label}.prompts")
    model.scheduler(settings.scheduler, settings.num_inference_steps, settings.height, settings.width)
    begun = settings.model_dump(exclude={"batch_size", "prompts", "prompts_per_shard"})
    begun |= {"model": model.name, "weights": model.weights, "seed": seed, "purpose": purpose, "round": round}
    shards = _plan(begun, prompts, settings.prompts_per_shard, folder, label)

    writer = GroupWriter(folder)
    left = [i for i in range(len(shards)) if not writer.has_shard(i)]
    images = settings.images_per_prompt
    done = len(prompts) - sum(len(shards[i]) for i in left)
    with Progress(label, len(prompts) * images, "img", done * images) as progress:
        for i in left:
            groups = [group_id(prompt, round) for prompt in shards[i]]
            text = model.encode_text([prompt.text for prompt in shards[i]], settings.max_sequence_length)
            rows = []
            for place, index, latent, image in _images(settings, model, groups, text, seed, purpose):
                row = ImageRow(
                    group_id=groups[place],
                    index=index,
                    prompt=shards[i][place],
                    image=image,
                    latent=latent,
                    seed=seed,
                    scheduler=settings.scheduler,
                    num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale,
                    max_sequence_length=settings.max_sequence_length,
                    height=settings.height,
                    width=settings.width,
                    generator=model.name,
                    revision=begun["weights"],
                    round=round,
                )
                rows.append(row)
                progress.advance()
            texts = {name: value.cpu() for name, value in text.items()}
            writer.write_shard(i, rows, {group: _rows(texts, [place]) for place, group in enumerate(groups)})


def _images(
    settings: Generation, model: FlowModel, groups: Sequence[str], text: Text, seed: int, purpose: str
) -> Iterator[tuple[int, int, Tensor, Image]]:
    """(place of the group, index in it, latent, image) of every image of `groups`, whose texts are `text`'s rows."""
    height, width = settings.height, settings.width
    shape = model.latent_shape(height, width)
    jobs = [(place, index) for place in range(len(groups)) for index in range(settings.images_per_prompt)]
    for start in range(0, len(jobs), settings.batch_size):
        batch = jobs[start : start + settings.batch_size]
        latents = generate(
            model,
            torch.stack([torch.randn(shape, generator=torch_rng(seed, purpose, groups[p], i)) for p, i in batch]),
            _rows(text, [place for place, _ in batch]),
            model.scheduler(settings.scheduler, settings.num_inference_steps, height, width),
            guidance_scale=settings.guidance_scale,
            height=height,
            width=width,
        )
        images = model.decode(latents, height, width)
        for (place, index), latent, image in zip(batch, latents.cpu(), images, strict=True):
            yield place, index, latent, image


def _rows(text: Text, places: list[int]) -> Text:
    return {name: value[places] for name, value in text.items()}


def group_id(prompt: Prompt, round: int) -> str:
    """The id of the prompt's group; a later round's group of the same prompt is another one."""
    return prompt.id if round == 0 else f"{prompt.id}@{round}"


def _plan(
    begun: dict[str, Any], prompts: Sequence[Prompt], prompts_per_shard: int, folder: Path, label: str
) -> list[Sequence[Prompt]]:
    """The prompts of each shard: those the store was begun with as they were, then any new ones."""
    path = folder / STARTED
    filled = folder.is_dir() and any(folder.glob("*.parquet"))
    if filled and not path.exists():
        raise UserError(f"{label}: {folder} holds groups of another origin; expected an empty or new folder")
    old_settings, old_shards = _begun(path) if filled else (begun, [])  # nothing yet: begun anew
    for field, value in begun.items():
        if old_settings.get(field) != value:
            raise UserError(
                f"{f'{label}.' if field in Generation.model_fields else ''}{field}: {folder} was sampled with "
                f"{old_settings.get(field)!r}, now {value!r}; expected the same value or another folder"
            )
    sizes = [shard["prompts"] for shard in old_shards]
    fresh = len(prompts) - sum(sizes)
    if fresh < 0:
        raise UserError(f"{label}.prompts: {folder} was begun with {sum(sizes)} prompts, now there are {len(prompts)}")
    sizes += [min(prompts_per_shard, fresh - start) for start in range(0, fresh, prompts_per_shard)]
    ends = list(accumulate(sizes))
    shards = [prompts[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    plan = [{"prompts": len(shard), "fingerprint": fingerprint([p.to_json() for p in shard])} for shard in shards]
    for i, shard in enumerate(old_shards):
        if shard != plan[i]:
            raise UserError(
                f'{label}.prompts: {folder} was begun with other prompts from "{shards[i][0].id}" on; '
                "expected the same ones first"
            )
    write_json(path, {"settings": begun, "shards": plan})
    return shards


def _begun(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings and shards a store was begun with."""
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        return dict(begun["settings"]), list(begun["shards"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; expected the settings its folder was sampled with") from None
