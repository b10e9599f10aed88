"""Sampling groups of images into a store, shard by shard; shared by sampling and evaluation."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from gdro.common import distributed
from gdro.common.errors import UserError
from gdro.common.files import fingerprint, sweep
from gdro.common.progress import Progress, say
from gdro.common.prompts import Prompt, check_unique_ids
from gdro.common.rng import torch_rng
from gdro.common.sealed import find_record, write_record
from gdro.groups.store import GroupWriter, ImageRow
from gdro.models.base import FlowModel, Text
from gdro.models.finite import check_rows, naming
from gdro.samplers.ode import generate
from gdro.samplers.rollout import rollout
from gdro.samplers.settings import Generation
from gdro.samplers.trajectory import Trajectory
from gdro.samplers.windows import window_steps

STARTED = "_sampling.json"


def sample_groups(
    settings: Generation,
    model: FlowModel,
    prompts: Sequence[Prompt],
    folder: str | Path,
    *,
    seed: int = 0,
    purpose: str = "noise",
    round: int = 0,
    label: str = "sample",
    make: "MakeShards | None" = None,
) -> Path:
    """Fill the store in `folder` with `settings.images_per_prompt` images of every prompt, resuming where it stopped.

    Returns `folder`. The noise of an image is a function of (seed, purpose, group, index), and a batch never crosses a
    shard: an interrupted job ends with the same bits, and another batch size or order of prompts only changes rounding.
    Appending prompts extends the store. Noise of stochastic steps is a function of (seed, purpose, group, index, step);
    the trajectories go into the store. If there are several sizes, a group's is a function of (seed, group). Several
    processes share the files. Raises UserError, naming `label`'s field, if the store was begun with other settings,
    prompts or weights, or if a setting does not suit the model.

    `make` creates the missing files outside of this process.
    """
    folder = Path(folder)
    if not prompts:
        raise UserError(f"{label}.prompts: no prompts given; expected at least one")
    check_unique_ids(prompts, f"{label}.prompts")
    for height, width in settings.sizes:
        model.scheduler(settings.scheduler, settings.num_inference_steps, height, width)
    begun = settings.model_dump(exclude={"batch_size", "prompts", "prompts_per_shard"})
    begun |= {"model": model.name, "fingerprint": model.fingerprint, "seed": seed, "purpose": purpose, "round": round}
    _check_weights(model)

    def missing() -> list[tuple[int, int, int]]:
        """(number, first prompt, one past its last) of each missing file."""
        ends = _plan(begun, prompts, settings.prompts_per_shard, folder, label)
        sweep(folder)
        writer = GroupWriter(folder)
        return [(i, start, end) for i, (start, end) in enumerate(pairwise([0, *ends])) if not writer.has_shard(i)]

    left = distributed.first(missing)
    jobs = [
        ShardJob(folder, i, tuple(prompts[start:end]), settings, begun["fingerprint"], seed, purpose, round)
        for i, start, end in distributed.mine(left)
    ]
    images, processes = settings.images_per_prompt, distributed.size()
    if 0 < len(left) < processes:
        say(f"{label}: {len(left)} files for {processes} processes; a smaller sample.prompts_per_shard keeps all busy")
    done = images * (len(prompts) - sum(end - start for _, start, end in left))
    own = images * sum(len(job.prompts) for job in jobs)
    idle = _batches_short(jobs) if distributed.is_sharded(model.transformer) else 0
    with Progress(distributed.of_first(label), done + own, "img", done) as progress:
        if make is not None and jobs:
            make(jobs, progress.advance)
        else:
            _make_shards(jobs, model, progress.advance)
    one = settings.model_copy(update={"images_per_prompt": 1})
    for _ in range(idle):
        list(_images(one, model, ["idle"], model.encode_text([""], settings.max_sequence_length), seed, "idle", round))
    distributed.wait()
    return folder


def _check_weights(model: FlowModel) -> None:
    """Raise UserError unless all processes have the same model, adapter included."""
    found = distributed.gather(model.fingerprint)
    for place, weights in enumerate(found):
        if weights != found[0]:
            raise UserError(
                f"model: {model.name} has the weights {weights} in process {place}, {found[0]} in the first; expected "
                "the same files and the same kind of device everywhere"
            )


def _batches_short(jobs: Sequence["ShardJob"]) -> int:
    """How many fewer batches this process makes than another: a sharded model computes in all processes or none."""
    made = distributed.gather(sum(len(batches(job.settings, job.groups, job.seed)) for job in jobs))
    return max(made) - made[distributed.rank()]


@dataclass(frozen=True)
class ShardJob:
    """File `number` of the store in `folder`, with everything that decides its bits except the model; picklable."""

    folder: Path
    number: int
    prompts: tuple[Prompt, ...]
    settings: Generation
    fingerprint: str  # `FlowModel.fingerprint` of the model that must make it
    seed: int
    purpose: str
    round: int

    @property
    def groups(self) -> list[str]:
        """Ids of the file's groups."""
        return [group_id(prompt, self.round) for prompt in self.prompts]


MakeShards = Callable[[Sequence[ShardJob], Callable[[int], None]], None]
"""Writes the file of every job and calls back after each image."""


def _make_shards(jobs: Sequence[ShardJob], model: FlowModel, made: Callable[[], None]) -> None:
    """`make_shard` for every job; each file is encoded and written while the next one's images are made.

    Encoding a PNG takes one core a sixth of the time that a fast GPU takes to make the image.
    """
    with ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for job in jobs:
            write = _made(job, model, made)
            if written is not None:
                written.result()
            written = writer.submit(write)
        if written is not None:
            written.result()


def make_shard(job: ShardJob, model: FlowModel, made: Callable[[], None]) -> None:
    """Make the images of a file of groups and write it atomically; `made()` is called after each image.

    The same job gives the same bits on any machine of the same kind, whatever else runs there.
    """
    _made(job, model, made)()


def _made(job: ShardJob, model: FlowModel, made: Callable[[], None]) -> Callable[[], None]:
    """Make the images of a file of groups; returns a function that writes them."""
    settings, groups = job.settings, job.groups
    text = model.encode_text([prompt.text for prompt in job.prompts], settings.max_sequence_length)
    with naming(model.name, [f'prompt "{prompt.id}"' for prompt in job.prompts]):
        for name, value in text.items():
            check_rows(f"the {name} of the text encoders", value)
    rows: list[ImageRow] = []
    paths: dict[str, list[Trajectory]] = {}
    done: list[Made] = []
    for one in _images(settings, model, groups, text, job.seed, job.purpose, job.round):
        done.append(one)
        made()
    for one in sorted(done, key=lambda one: (one.place, one.index)):
        row = ImageRow(
            group_id=groups[one.place],
            index=one.index,
            prompt=job.prompts[one.place],
            image=one.image,
            latent=one.latent,
            seed=job.seed,
            scheduler=settings.scheduler,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            max_sequence_length=settings.max_sequence_length,
            height=one.image.height,
            width=one.image.width,
            generator=model.name,
            revision=job.fingerprint,
            round=job.round,
            sampler=settings.sampler,
        )
        rows.append(row)
        if one.path is not None:
            paths.setdefault(row.group_id, []).append(one.path)
    texts = {name: value.cpu() for name, value in text.items()}
    return partial(
        GroupWriter(job.folder).write_shard,
        job.number,
        rows,
        {group: _rows(texts, [place]) for place, group in enumerate(groups)},
        {group: _joined(of_images) for group, of_images in paths.items()} if paths else None,
    )


@dataclass(frozen=True)
class Made:
    """An image of the `place`-th group; `path` is its own trajectory (K = 1) if it was sampled stochastically."""

    place: int
    index: int
    latent: Tensor
    image: Image
    path: Trajectory | None


def _images(
    settings: Generation, model: FlowModel, groups: Sequence[str], text: Text, seed: int, purpose: str, round: int
) -> Iterator[Made]:
    """Make every image of `groups`, whose text embeddings are the rows of `text`."""
    for (height, width), batch in batches(settings, groups, seed):
        shape = model.latent_shape(height, width)

        def normal(
            *step: int,
            shared: bool = False,
            batch: list[tuple[int, int]] = batch,
            shape: tuple[int, int] = shape,
        ) -> Tensor:
            """Noise of each image of the batch, or of its group."""
            named = [(groups[place], 0 if shared else index) for place, index in batch]
            return torch.stack([torch.randn(shape, generator=torch_rng(seed, purpose, *n, *step)) for n in named])

        noise, texts = normal(shared=settings.shared_noise), _rows(text, [place for place, _ in batch])
        scheduler = model.scheduler(settings.scheduler, settings.num_inference_steps, height, width)
        how: dict[str, Any] = {"guidance_scale": settings.guidance_scale, "height": height, "width": width}
        paths: Sequence[Trajectory | None]
        with naming(model.name, [f'image "{groups[place]}/{index}"' for place, index in batch]):
            if settings.noise_level is None:
                latents, paths = generate(model, noise, texts, scheduler, **how), [None] * len(batch)
            else:
                latents, trajectory = rollout(
                    model,
                    noise,
                    texts,
                    scheduler,
                    sampler=settings.sampler,
                    noise_level=settings.noise_level,
                    window=_window(settings, seed, round),
                    step_noise=normal,
                    **how,
                )
                paths = _split(trajectory)
            images = model.decode(latents, height, width)
        for (place, index), latent, image, path in zip(batch, latents.cpu(), images, paths, strict=True):
            yield Made(place, index, latent, image, path)


def batches(
    settings: Generation, groups: Sequence[str], seed: int
) -> list[tuple[tuple[int, int], list[tuple[int, int]]]]:
    """((height, width), its (group place, index) pairs) of each batch: at most `batch_size` images, of one size."""
    sizes = [settings.sizes[_dealt(len(settings.sizes), seed, group)] for group in groups]
    found = []
    for size in dict.fromkeys(sizes):
        places = [place for place in range(len(groups)) if sizes[place] == size]
        jobs = [(place, index) for place in places for index in range(settings.images_per_prompt)]
        found += [(size, jobs[i : i + settings.batch_size]) for i in range(0, len(jobs), settings.batch_size)]
    return found


def _dealt(sizes: int, seed: int, group: str) -> int:
    return int(torch.randint(sizes, (), generator=torch_rng(seed, "size", group)))


def _split(whole: Trajectory) -> list[Trajectory]:
    """One trajectory (K = 1) per image."""
    images = zip(whole.states.split(1), whole.log_probs.split(1), strict=True)
    return [Trajectory(states, log_probs, whole.times) for states, log_probs in images]


def _joined(images: Sequence[Trajectory]) -> Trajectory:
    states, log_probs = torch.cat([i.states for i in images]), torch.cat([i.log_probs for i in images])
    return Trajectory(states, log_probs, images[0].times)


def _window(settings: Generation, seed: int, round: int) -> range:
    return window_steps(
        settings.window,
        size=settings.window_size,
        start=settings.window_start,
        interval=settings.window_interval,
        num_steps=settings.num_inference_steps,
        round=round,
        seed=seed,
    )


def _rows(text: Text, places: list[int]) -> Text:
    return {name: value[places] for name, value in text.items()}


def group_id(prompt: Prompt, round: int) -> str:
    """The id of the prompt's group in this round; each round has its own."""
    return prompt.id if round == 0 else f"{prompt.id}@{round}"


def check_round_ids(prompts: Sequence[Prompt], field: str) -> None:
    """Raise UserError if a prompt's group could, in a later round, have the id of another prompt's."""
    ids = {prompt.id for prompt in prompts}
    for one in ids:
        other, at, number = one.rpartition("@")
        if at and number.isdecimal() and other in ids:
            raise UserError(
                f'{field} has the ids "{other}" and "{one}", which is what the group of the former '
                f"is called in round {int(number)}; expected another id"
            )


def _plan(
    begun: dict[str, Any], prompts: Sequence[Prompt], prompts_per_shard: int, folder: Path, label: str
) -> list[int]:
    """Where each file's prompts end: first the store's original files, unchanged, then any new ones."""
    path = folder / STARTED
    filled = folder.is_dir() and any(folder.glob("*.parquet"))
    old = read_begun(path) if filled else (begun, [])  # empty: start over
    if old is None:
        raise UserError(f"{label}: {folder} holds groups of another origin; expected an empty or new folder")
    old_settings, old_shards = old
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
    write_record(path, {"settings": begun, "shards": plan})
    return list(accumulate(len(shard) for shard in shards))


def read_begun(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The settings and shards a store was begun with; None without the file."""
    begun = find_record(path)
    return None if begun is None else (begun["settings"], begun["shards"])
