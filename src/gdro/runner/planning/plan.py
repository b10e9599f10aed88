"""The cost of a run: passes, seconds, memory and disk, from its configuration and the shapes of its model.

Everything here is arithmetic on `Shapes` (counted), `Device` (measured or assumed) and `RunConfig`.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gdro.common.errors import UserError
from gdro.runner.config import RunConfig
from gdro.runner.planning.gpus import Device
from gdro.runner.planning.shapes import Shapes, largest_size
from gdro.samplers.settings import Generation
from gdro.training.learner import MicroBatch
from gdro.training.micro_batch import MARGIN, largest_micro_batch

LORA_BYTES = 5 * 4  # a trained parameter, its gradient, AdamW's two moments, its average: float32
CHECKPOINT_BYTES = 4 * 4  # the parameter, its average, the moments
SURE = 0.85  # planned activations are within 15 % of measured ones, so at least this share is needed
GENERATING = frozenset({"sample", "evaluate"})
ROUND_AND_EVALUATE = GENERATING | {"train"}
PNG_BYTES = 2.0  # per pixel, for images with some detail
ROW_BYTES = 600  # per image besides pixels and latent: ids, prompt, settings

Pace = Callable[[str, int], float]  # (a pass of Shapes, images at once) -> seconds


@dataclass(frozen=True)
class Stage:
    """A stage of the whole run. None means unknown."""

    name: str
    images: int | None  # made, trained on (each visit counts) or measured
    flops: float | None  # of one
    seconds: float | None  # of one; of scoring, of one CPU core
    nfe: int | None  # total model evaluations, as a run counts them

    @property
    def hours(self) -> float | None:
        """Hours of the stage; None if unknown."""
        return None if None in (self.images, self.seconds) else self.images * self.seconds / 3600  # type: ignore[operator]


@dataclass(frozen=True)
class Plan:
    """What a run will cost, by stage and part."""

    stages: list[Stage]
    memory: dict[str, float]  # bytes by part
    totals: dict[str, float]  # bytes by stage, at its peak
    disk: dict[str, float | None]  # bytes
    micro_batch: MicroBatch  # how much of a training step goes through the model at once
    prompts: int | None  # of sample.prompts
    advice: list[str]  # what to change if it does not fit

    @property
    def hours(self) -> float | None:
        """GPU hours of the run; None if the number of images is not known."""
        hours = [stage.hours for stage in self.stages if stage.name != "score"]
        return None if None in hours else sum(hours)  # type: ignore[arg-type]

    @property
    def nfe_per_prompt(self) -> dict[str, float] | None:
        """Model evaluations of sampling and of training, per training prompt: what a run costs on any device."""
        nfe = {stage.name: stage.nfe for stage in self.stages if stage.name in ("sample", "train")}
        if not self.prompts or None in nfe.values():
            return None
        return {name: cost / self.prompts for name, cost in nfe.items() if cost is not None}


def plan(
    config: RunConfig, shapes: Shapes, device: Device, prompts: Mapping[str, int | None], pace: Pace | None = None
) -> Plan:
    """The plan of a run. `prompts`: the number of "train", "validation" and "test" prompts; None if unknown.

    `pace` replaces the device's rates by measured seconds.
    """
    micro_batch = micro_batch_of(config, shapes, device.memory)
    parts = memory_parts(config, shapes, micro_batch)
    totals = memory_totals(parts, validates=config.train.validates)
    return Plan(
        stages=_stages(config, shapes, micro_batch, prompts, pace or _pace(shapes, device)),
        memory=parts,
        totals=totals,
        disk=_disk(config, shapes, prompts),
        micro_batch=micro_batch,
        prompts=prompts["train"],
        advice=_advice(config, shapes, totals, device.memory),
    )


def _pace(shapes: Shapes, device: Device) -> Pace:
    return lambda kind, images: device.seconds(getattr(shapes, kind), images)


# ---- work


def _stages(
    config: RunConfig, shapes: Shapes, micro_batch: MicroBatch, prompts: Mapping[str, int | None], pace: Pace
) -> list[Stage]:
    rounds = config.rounds.count(config.train.max_train_steps)
    due = config.rounds.prompts or prompts["train"]
    made = None if due is None else rounds * due * config.sample.images_per_prompt
    measuring = config.evaluate.generation(config.sample)
    validations = _validations(config)
    validated = _times(prompts["validation"], validations * measuring.images_per_prompt)
    tested = _times(prompts["test"], 2 * measuring.images_per_prompt)  # base and tuned
    stages = [
        _generating("sample", made, config.sample, shapes, pace),
        Stage("score", made, None, _ocr_seconds(config) if config.score.reward == "ocr" else None, None),
        _training(config, shapes, micro_batch, prompts["train"], pace),
    ]
    if config.train.validates:
        stages.append(_generating("validate", validated, measuring, shapes, pace))
    return [*stages, _generating("evaluate", tested, measuring, shapes, pace)]


def _ocr_seconds(config: RunConfig) -> float:
    """Seconds of one core per image: 14 ms at 64x32, 280 ms at 512x512 (measured), linear in the pixels."""
    return 0.0119 + 1.023e-6 * math.prod(largest_size(config))


def _generating(name: str, images: int | None, settings: Generation, shapes: Shapes, pace: Pace) -> Stage:
    batch, calls = settings.batch_size, settings.calls
    flops = calls * shapes.base.flops + shapes.decode.flops + shapes.text_flops / settings.images_per_prompt
    seconds = (calls * pace("base", batch) + pace("decode", batch)) / batch
    return Stage(name, images, flops, seconds, _times(images, calls * shapes.nfe))


def _training(config: RunConfig, shapes: Shapes, micro_batch: MicroBatch, prompts: int | None, pace: Pace) -> Stage:
    """Counts every image of every draw; for a trajectory objective, every step trained on."""
    train, objective = config.train, config.train.objective
    images = train.max_train_steps * train.groups_per_step * train.k * _transitions(config)
    others = _other_passes(config, prompts, images)
    two_pass = micro_batch.images is not None and "trajectories" not in objective.needs
    again = images if two_pass else 0
    batch = micro_batch.images_of(train.k)
    unlearned = (others + again) / images
    return Stage(
        "train",
        images,
        unlearned * shapes.base.flops + shapes.learning.flops,
        (unlearned * pace("base", batch) + pace("learning", batch)) / batch,
        round((others + 3 * images) * shapes.nfe),  # as a run counts them: without the second pass
    )


def _transitions(config: RunConfig) -> int:
    """Stochastic steps trained on at each draw; 1 for an objective that noises afresh."""
    if "trajectories" not in config.train.objective.needs:
        return 1
    window = config.sample.window_size or config.sample.num_inference_steps - 1
    return max(1, round(config.train.timestep_fraction * window))


def _other_passes(config: RunConfig, prompts: int | None, images: int) -> float:
    """Passes without gradient that the objective needs, besides the policy's."""
    train, objective = config.train, config.train.objective
    steps = train.max_train_steps
    fresh = config.rounds.count(steps) / steps  # share of steps at which the policy is still the one that sampled
    base = images * objective.uses_base
    if "trajectories" in objective.needs:
        return base + images * objective.uses_old_mean * (1 - fresh)
    if not objective.uses_reference:
        return base
    if train.reference_draws is not None and prompts is not None:
        pool = (config.rounds.prompts or prompts) * config.sample.images_per_prompt * train.reference_draws
        return base + pool * (1 - math.exp(-images / pool))  # each entry of the pool once, if it comes up at all
    return base + images * (1 - fresh if objective.reference == "old" else 1)


def _validations(config: RunConfig) -> int:
    """The base's, one every `validation_steps`, and the last step's."""
    steps, every = config.train.max_train_steps, config.train.validation_steps
    return 1 + math.ceil(steps / every) if config.train.validates else 0


def _times(count: int | None, factor: int) -> int | None:
    return None if count is None else count * factor


# ---- memory


def micro_batch_of(config: RunConfig, shapes: Shapes, memory: float) -> MicroBatch:
    """How much of a step goes through the model at once on a device with `memory` bytes, as training would choose."""
    train = config.train
    groups = train.micro_batch_groups or train.groups_per_step
    if train.group_gradient != "auto":
        return MicroBatch(groups, train.images_per_pass or 1 if train.group_gradient == "two_pass" else None)
    free = memory - shapes.transformer.bytes - LORA_BYTES * shapes.trainable
    fit = int(MARGIN * free / shapes.saved)
    return largest_micro_batch(fit, groups=groups, k=train.k)


def memory_parts(config: RunConfig, shapes: Shapes, micro_batch: MicroBatch) -> dict[str, float]:
    """Bytes on the device by part."""
    at_once = micro_batch.images_of(config.train.k)
    train, batch = config.train, max(config.sample.batch_size, config.evaluate.batch_size)
    return {
        "base weights": shapes.transformer.bytes,
        "text encoders": shapes.text_encoders.bytes,
        "VAE": shapes.vae.bytes,
        "LoRA, gradient, AdamW, EMA": LORA_BYTES * shapes.trainable,
        f"sampling, {batch} images at once": shapes.base.memory(batch),
        f"VAE decode, {batch} images at once": shapes.decode.memory(batch),
        f"a group of {train.k}, one pass": shapes.learning.memory(train.k),
        "a group, two passes, one image at once": shapes.learning.memory(1),
        f"training, {at_once} images at once": shapes.learning.memory(at_once),
    }


def memory_totals(parts: Mapping[str, float], *, validates: bool) -> dict[str, float]:
    """Bytes on the device at the peak of each stage; during training, text encoders and VAE are elsewhere.

    A validation makes images while the optimizer is in memory.
    """
    base, encoders, vae, lora, sampling, decoding, _, _, training = parts.values()
    return {
        "sample, evaluate": base + encoders + vae + lora * validates + max(sampling, decoding),
        "train": base + lora + training,
    }


def _advice(config: RunConfig, shapes: Shapes, totals: Mapping[str, float], memory: float) -> list[str]:
    """What to change, for each stage that needs more than there is."""
    advice = []
    loaded = shapes.transformer.bytes + shapes.text_encoders.bytes + shapes.vae.bytes
    fewer = [] if config.mixed_precision == "bf16" else ["mixed_precision: bf16"]
    fewer += [] if config.quantization else ["quantization: int8 or nf4"]
    if loaded > memory:
        return [
            f"the weights alone need {loaded / 1e9:.1f} GB of {memory / 1e9:.1f}: {_either(fewer or ['a larger GPU'])}"
        ]
    for stage, need in totals.items():
        if need <= memory:
            continue
        if stage == "train":
            free = memory - shapes.transformer.bytes - LORA_BYTES * shapes.trainable - shapes.learning.shared_peak
            fit = int(free / shapes.learning.peak)
            if fit >= config.train.k:
                changes = [f"train.micro_batch_groups: {fit // config.train.k}"]
            elif fit >= 1:
                changes = [f"train.group_gradient: two_pass with train.images_per_pass: {fit}"]
            else:
                changes = ["smaller sample.height and width"]
            changes += [] if config.train.gradient_checkpointing else ["train.gradient_checkpointing: true"]
        else:
            fit = int((memory - loaded) / max(shapes.base.peak, shapes.decode.peak))
            changes = [f"sample.batch_size and evaluate.batch_size: {max(1, fit)}"]
        advice.append(f"{stage} needs {need / 1e9:.1f} GB of {memory / 1e9:.1f}: {_either(changes + fewer)}")
    return advice


def _either(changes: Sequence[str]) -> str:
    return f"try {', or '.join(changes)}"


def refuse(config: RunConfig, shapes: Shapes, memory: float, stages: Collection[str]) -> None:
    """Raise UserError if one of `stages` certainly needs more than `memory` bytes, judging by its minimum."""
    base, lora = shapes.transformer.bytes, LORA_BYTES * shapes.trainable
    train = config.train
    if train.group_gradient == "auto":  # it goes down to one image at a time
        images, change = 1, "train.gradient_checkpointing: true, or smaller images"
    else:
        images = micro_batch_of(config, shapes, memory).images_of(train.k)
        change = "train.group_gradient: auto" if images > 1 else "train.gradient_checkpointing: true, or smaller images"
    learning = SURE * shapes.learning.memory(images)
    needs = [
        ("base weights", base, ROUND_AND_EVALUATE, "mixed_precision: bf16, or quantization: int8 or nf4"),
        ("base weights and text encoders", base + shapes.text_encoders.bytes, GENERATING, "mixed_precision: bf16"),
        *(
            (
                f"base weights and {settings.batch_size} images being made",
                base
                + shapes.vae.bytes
                + SURE * max(w.memory(settings.batch_size) for w in (shapes.base, shapes.decode)),
                {stage},
                f"a smaller {stage}.batch_size",
            )
            for stage, settings in (("sample", config.sample), ("evaluate", config.evaluate.generation(config.sample)))
        ),
        ("base weights, LoRA and optimizer", base + lora, {"train"}, "a smaller train.rank"),
        (f"base weights and {images} images being trained on", base + lora + learning, {"train"}, change),
    ]
    for part, need, where, what in needs:
        if need > memory and where & set(stages):
            raise UserError(
                f"model: {config.model}: {part} need at least {need / 1e9:.1f} GB by the plan, the GPU has "
                f"{memory / 1e9:.1f}; expected {what} (see gdro plan)"
            )


# ---- disk


def _disk(config: RunConfig, shapes: Shapes, prompts: Mapping[str, int | None]) -> dict[str, float | None]:
    """Bytes in the run directory when the run ends."""
    train, sample = config.train, config.sample
    rounds, measuring = config.rounds.count(train.max_train_steps), config.evaluate.generation(config.sample)
    latent = 4 * shapes.latent[0] * shapes.latent[1]
    image = latent + PNG_BYTES * math.prod(largest_size(config)) + ROW_BYTES

    def store(groups: int | None, images: int) -> float | None:
        return None if groups is None else groups * (images * image + shapes.text_bytes)

    due = config.rounds.prompts or prompts["train"]
    groups = None if due is None else rounds * due
    kept: dict[str, float | None] = {"groups": store(groups, sample.images_per_prompt)}
    if sample.sampler != "ode":  # emptied once a round is no longer trained on
        states = latent * (1 + (sample.window_size or sample.num_inference_steps - 1))
        kept["trajectories"] = (
            None if due is None else min(rounds, config.rounds.keep) * due * sample.images_per_prompt * states
        )
    if train.validates:
        kept["validation (the last)"] = store(prompts["validation"], measuring.images_per_prompt)
    test = store(prompts["test"], measuring.images_per_prompt)
    kept["evaluation (base and tuned)"] = None if test is None else 2 * test
    saved = math.ceil(train.max_train_steps / train.checkpointing_steps)
    limit = saved if train.checkpoints_total_limit is None else train.checkpoints_total_limit + train.validates
    kept["checkpoints"] = min(saved, limit) * CHECKPOINT_BYTES * shapes.trainable
    kept["adapter (averaged and raw)"] = 2 * 4 * shapes.trainable
    return kept


def to_json(found: Plan) -> dict[str, Any]:
    """The whole plan, in bytes, FLOPs and seconds; null means unknown."""
    stages = {s.name: {**vars(s), "hours": s.hours} for s in found.stages}
    return {
        "stages": {name: {k: v for k, v in row.items() if k != "name"} for name, row in stages.items()},
        "gpu_hours": found.hours,
        "nfe_per_prompt": found.nfe_per_prompt,
        "memory": found.memory,
        "memory_by_stage": found.totals,
        "disk": found.disk,
        "images_at_once_in_training": found.micro_batch.images,
        "advice": found.advice,
    }
