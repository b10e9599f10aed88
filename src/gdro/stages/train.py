"""Third stage: a LoRA trained by GDRO on stored, scored groups.

Features: soft-target GDRO, rank-only and top-1 objectives, top-1 regulariser; reference = adapter disabled; any number
of groups a step by gradient accumulation; EMA; exact resumption; validation that keeps the best checkpoint.
Limits: one device; one prompt length and image size a store; the learning rate is constant.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from gdro.errors import UserError
from gdro.files import fingerprint, sweep
from gdro.groups.store import GroupStore
from gdro.models.base import FlowModel
from gdro.objectives.forward.gdro import (
    diagnostics,
    implicit_reward,
    listwise_loss,
    start_loss,
    targets,
    velocity_error,
)
from gdro.progress import Progress
from gdro.rewards.store import read_rewards
from gdro.training.batch import Batch, Batches, Visit, Visits
from gdro.training.checkpoint import (
    Checkpoint,
    check_settings,
    find_checkpoint,
    load_optimizer,
    mark_best,
    optimizer_tensors,
    prune_checkpoints,
    save_checkpoint,
)
from gdro.training.ema import Ema, ema_decay
from gdro.training.log import DriftAlarm, MetricsLog, require_trackers

Validate = Callable[[FlowModel, int], dict[str, float]]


class TrainConfig(BaseModel):
    """Section `train`. The defaults are the paper's OCR run where it states a value, the likely ones elsewhere."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    objective: Literal["gdro", "rank", "top1"] = Field(
        "gdro", description="gdro: soft targets; rank: one-hot (Plackett-Luce; DPO if k = 2); top1: softmax over k."
    )
    k: int = Field(6, ge=2, description="Images of a group seen at each visit, of the K sampled.")
    tau: float = Field(0.05, description="Temperature of the soft targets, in units of reward; smaller is harder.")
    beta: float = Field(12.0, gt=0, description="s = -beta (d - d_ref), d the mean squared velocity error.")
    gamma: float = Field(0.5, ge=0, description="Weight of the velocity error of the group's best image.")
    learning_rate: float = Field(3e-4, gt=0, description="AdamW's learning rate, constant.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta 1.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's beta 2.")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="The gradient's norm is clipped to this.")
    max_train_steps: int = Field(300, ge=1, description="Optimizer steps of the whole run.")
    groups_per_step: int = Field(16, ge=1, description="Groups an optimizer step; times k: images a step.")
    micro_batch_groups: int | None = Field(
        None, ge=1, description="Groups a forward pass; null: all. Fewer need less memory for the same gradient."
    )
    rank: int = Field(32, ge=1, description="Rank of the LoRA.")
    lora_alpha: int = Field(64, ge=1, description="The LoRA is scaled by lora_alpha / rank.")
    target_modules: str | list[str] = Field(
        "attention+ff", description="Layers that get a LoRA: attention, attention+ff, all-linear, or name endings."
    )
    ema_decay: float = Field(0.5, ge=0, lt=1, description="The EMA's decay at step i is min(ema_warmup i, ema_decay).")
    ema_warmup: float = Field(0.001, ge=0, description="Growth of the EMA's decay a step.")
    timestep: Literal["logit_normal", "uniform"] = Field("logit_normal", description="Distribution of t.")
    timestep_scope: Literal["group", "image"] = Field("group", description="Who shares a draw of t.")
    noise_scope: Literal["group", "image"] = Field("group", description="Who shares a draw of eps.")
    subset: Literal["spread", "random", "extremes"] = Field(
        "spread", description="The k of K: one from each of k slices of the reward ranking; any k; the best and worst."
    )
    memory_gigabytes: float = Field(
        4.0, ge=0, description="Latents and text embeddings kept in memory; the rest is read at each visit."
    )
    checkpointing_steps: int = Field(50, ge=1, description="Steps between checkpoints; the last step always has one.")
    checkpoints_total_limit: int | None = Field(
        3, ge=1, description="Older checkpoints are deleted, never the best one; null: keep all."
    )
    resume_from_checkpoint: str | None = Field(
        "latest", description="latest (from the start if there is none), a checkpoint's folder, or null: start anew."
    )
    validation_steps: int = Field(50, ge=0, description="Steps between validations; 0: none.")
    validation_prompts: str | None = Field(
        None, description="A .txt or .jsonl file or tiny:TASK:SPLIT:COUNT[:SEED]; null: no validation."
    )
    alarm_drift: float = Field(
        0.02, gt=0, description="Alarm when the best images' error exceeds the reference's by this share for 20 steps."
    )
    report_to: list[Literal["tensorboard"]] = Field([], description="Trackers beside metrics.jsonl.")

    @property
    def validates(self) -> bool:
        return self.validation_prompts is not None and self.validation_steps > 0

    @field_validator("tau")
    @classmethod
    def _tau(cls, tau: float) -> float:
        if tau <= 0:
            raise ValueError("a number greater than 0 (for the limit tau -> 0 set objective: rank)")
        return tau


# Fields that change how a run is recorded or how long it goes on, never the weights at a given step.
MAY_CHANGE = frozenset(
    f"train.{name}"
    for name in (
        "max_train_steps",
        "memory_gigabytes",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "report_to",
    )
)


@dataclass
class Learner:
    """Everything a step reads and changes."""

    config: TrainConfig
    model: FlowModel
    geometry: dict[str, Any]  # guidance_scale, height, width: as the groups were made
    parameters: dict[str, torch.nn.Parameter]
    visits: Visits
    batches: Batches
    optimizer: torch.optim.Optimizer
    ema: Ema


def train(
    config: TrainConfig,
    model: FlowModel,
    groups: Path,
    rewards: Path,
    out: Path,
    *,
    seed: int,
    sampling: Mapping[str, Any],
    validate: Validate | None = None,
) -> None:
    """Train an adapter on the store `groups` with the scores in the file `rewards`.

    Writes `out`/metrics.jsonl and `out`/checkpoints. `sampling` holds the settings training and generation must share
    (guidance_scale, max_sequence_length, height, width). `validate(model, step)` returns figures of the model as it is:
    "corrected", or without a judge "reward", decides which checkpoint is best. Raises UserError for bad input before
    any work, and if the loss stops being finite.
    """
    learner, settings = prepare(config, model, groups, rewards, seed=seed, sampling=sampling)
    folder = out / "checkpoints"
    checkpoint = find_checkpoint(folder, config.resume_from_checkpoint, config.max_train_steps)
    start = 0
    memory: dict[str, Any] = {"best": None, "alarm": {}}
    if checkpoint is not None:
        check_settings(checkpoint, settings, MAY_CHANGE)
        _restore(learner, checkpoint)
        start, memory = checkpoint.step, checkpoint.memory
    alarm, best = DriftAlarm(config.alarm_drift, **memory["alarm"]), memory["best"]
    validate = validate if config.validation_steps else None
    images, checked = config.groups_per_step * config.k, False
    sweep(folder)
    mark_best(folder, best)

    log = MetricsLog(out / "metrics.jsonl", resumed=start if checkpoint else None, report_to=config.report_to)
    with log, Progress("train", config.max_train_steps, "step", done=start) as progress:
        if validate and not start:
            log.write(0, _validate(learner, validate, 0), under="validation")
        for step in range(start + 1, config.max_train_steps + 1):
            began = time.perf_counter()
            figures = train_step(learner, step)
            ringing = alarm.update(step, figures["drift_best"], figures["loss_top1"])
            seconds = time.perf_counter() - began
            speed = {"images_per_second": images / seconds, "seconds": seconds, "alarm": ringing}
            log.write(step, figures | {"lr": config.learning_rate} | speed)
            if not checked and any(visit.ranked for visit in learner.visits.at(step)):
                check_reference(learner, step, figures["loss_gdro"])
                checked = True

            last, improved = step == config.max_train_steps, False
            if validate and (last or step % config.validation_steps == 0):
                found = _validate(learner, validate, step)
                log.write(step, found, under="validation")
                improved = best is None or _quality(found) > _quality(best)
                best = {"step": step, **found} if improved else best
            if last or improved or step % config.checkpointing_steps == 0:
                log.sync()
                mark_best(folder, best)
                save_checkpoint(
                    folder,
                    step,
                    adapter=learner.parameters,
                    ema=learner.ema.weights,
                    optimizer=optimizer_tensors(learner.optimizer, list(learner.parameters)),
                    settings=settings,
                    memory={"best": best, "alarm": {"window": list(alarm.window), "on": alarm.on}},
                )
                prune_checkpoints(folder, limit=config.checkpoints_total_limit, best=best["step"] if best else None)
            progress.advance(1, loss=figures["loss"], drift_best=figures["drift_best"])


def train_step(learner: Learner, step: int) -> dict[str, float]:
    """One update of the adapter and its EMA; the step's figures, means over the groups that carry a ranking.

    Raises UserError, before anything is changed, if the loss or gradient is not finite.
    """
    config = learner.config
    visits = learner.visits.at(step)
    ranked = max(1, sum(visit.ranked for visit in visits))
    size = config.micro_batch_groups or len(visits)
    totals: dict[str, Tensor] = {}
    for first in range(0, len(visits), size):
        figures = backward(learner, visits[first : first + size], ranked)
        totals = {name: totals[name] + value for name, value in figures.items()} if totals else figures
    totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(learner.parameters.values(), config.max_grad_norm)

    names = list(totals)
    means = dict(zip(names, torch.stack([totals[name] for name in names]).tolist(), strict=True))  # the only sync
    loss = means["loss_gdro"] + config.gamma * means["loss_top1"]
    for name, value in (("loss", loss), ("gradient norm", means["grad_norm"])):
        if not math.isfinite(value):
            raise UserError(
                f"train.learning_rate: {config.learning_rate}: the {name} is {value} at step {step}; "
                "expected a finite number. Try a smaller rate with another --out; copy groups/ and rewards/ there"
            )
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    learner.ema.update(learner.parameters, ema_decay(step, warmup=config.ema_warmup, decay=config.ema_decay))
    return {"loss": loss, **means}


def backward(learner: Learner, visits: Sequence[Visit], ranked: int) -> dict[str, Tensor]:
    """Add the gradient of sum over `visits` of (L_GDRO + gamma d_top-1) / ranked; return the same sums of the figures.

    A visit whose k rewards are all equal counts for nothing: it has no ranking and no best image.
    """
    config = learner.config
    batch = learner.batches.of(visits)
    d_ref, d = _errors(learner, batch)
    s = implicit_reward(d, d_ref, config.beta)
    q = targets(config.objective, batch.rewards, config.tau).to(s)
    ranking = listwise_loss(s, q)
    share = batch.ranked / ranked
    ((ranking + config.gamma * d[:, 0]) * share).sum().backward()

    drift = (d - d_ref).detach()
    figures = {"loss_gdro": ranking.detach(), "loss_top1": d[:, 0].detach(), **diagnostics(s, q)}
    figures |= {"drift_best": drift[:, 0], "drift_worst": drift[:, -1]}
    return {name: (value * share).sum() for name, value in figures.items()}


def _errors(learner: Learner, batch: Batch) -> tuple[Tensor, Tensor]:
    """Velocity errors (g, k) of the reference, without gradient, and of the policy, on the same x_t."""
    x_t = ((1 - batch.t) * batch.x0 + batch.t * batch.eps).flatten(0, 1)
    v = (batch.eps - batch.x0).flatten(0, 1)
    t = batch.t.flatten()

    def error() -> Tensor:
        return velocity_error(v, learner.model.velocity(x_t, t, batch.text, **learner.geometry)).view(batch.t.shape[:2])

    with torch.no_grad(), learner.model.adapter_disabled():
        d_ref = error()
    return d_ref, error()


def check_reference(learner: Learner, step: int, loss: float) -> None:
    """Raise RuntimeError unless the update of `step` left policy and reference two models, the reference unmoved.

    `step` must have had a visit with a ranking, or there was no update. A model compiled or patched wrongly can return
    adapted outputs while its adapter is disabled. At step 1 the ranking loss must have been that of policy = reference.
    """
    config, visits = learner.config, learner.visits.at(step)
    expected = start_loss(config.objective, config.k)
    if step == 1 and abs(loss - expected) > 1e-3:
        raise RuntimeError(f"the loss at step 1 is {loss}, not {expected}: policy and reference differ at the start")
    with torch.no_grad():
        batch = learner.batches.of(visits[:1])
        d_ref, d = _errors(learner, batch)
        own = {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}
        learner.model.load_adapter_state({name: 2 * value for name, value in own.items()})
        try:
            d_ref_again, _ = _errors(learner, batch)
        finally:
            learner.model.load_adapter_state(own)
    gap = (d - d_ref).abs().max()
    if gap == 0:
        raise RuntimeError("after an update the policy equals the reference: the adapter has no effect")
    if (d_ref_again - d_ref).abs().max() > 0.1 * gap:
        raise RuntimeError("the reference moves with the adapter: disabling the adapter has no effect")


def check_sampling(store: GroupStore, sampling: Mapping[str, Any]) -> None:
    """Raise UserError if `store` was made with other settings than `sampling`'s."""
    for field, value in sampling.items():
        if store.settings[field] != value:
            raise UserError(
                f"sample.{field}: {value!r}, but the groups in {store.folder} were made with "
                f"{store.settings[field]!r}; training must use the same"
            )


def prepare(
    config: TrainConfig, model: FlowModel, groups: Path, rewards: Path, *, seed: int, sampling: Mapping[str, Any]
) -> tuple[Learner, dict[str, Any]]:
    """The learner before step 1, and the settings a resumed run must share. Refuses what cannot be trained on."""
    require_trackers(config.report_to)
    store = GroupStore(groups)
    check_sampling(store, sampling)
    if store.settings["revision"].partition("+")[0] != model.revision:  # "+" precedes the digest of an adapter
        raise UserError(
            f"model: {model.name} has revision {model.revision!r}, but the groups in {groups} were made with "
            f"{store.settings['revision']!r}; training must use the same"
        )
    scores = read_rewards(rewards, store)
    visits = Visits(
        scores,
        k=config.k,
        subset=config.subset,
        groups_per_step=config.groups_per_step,
        seed=seed,
        where=str(rewards),
    )
    height, width = store.settings["height"], store.settings["width"]
    expected, found = model.latent_shape(height, width), tuple(store.latents(store.group_ids[0]).shape[1:])
    if found != expected:
        raise UserError(
            f"model: {model.name} has latents {expected} at {width}x{height}, those in {groups} are {found}"
        )

    model.add_adapter(rank=config.rank, alpha=config.lora_alpha, targets=config.target_modules, seed=seed)
    parameters = model.adapter()
    learner = Learner(
        config=config,
        model=model,
        geometry={"guidance_scale": store.settings["guidance_scale"], "height": height, "width": width},
        parameters=parameters,
        visits=visits,
        batches=Batches(
            store,
            timestep=config.timestep,
            timestep_scope=config.timestep_scope,
            noise_scope=config.noise_scope,
            memory_bytes=config.memory_gigabytes * 1e9,
            device=model.device,
            seed=seed,
        ),
        optimizer=torch.optim.AdamW(
            parameters.values(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        ),
        ema=Ema(parameters),
    )
    settings = {f"train.{name}": value for name, value in config.model_dump(mode="json").items()}
    settings |= {
        "seed": seed,
        "model": model.revision,
        "mixed_precision": "bf16" if next(model.transformer.parameters()).dtype == torch.bfloat16 else "no",
        "groups": fingerprint(store.contents),
        "rewards": fingerprint({group: values.tolist() for group, values in scores.items()}),
    }
    print(
        f"train: {len(visits.rewards)} groups, {visits.excluded} left out (all rewards equal); "
        f"{config.groups_per_step} groups x {config.k} images a step, "
        f"{sum(p.numel() for p in parameters.values())} parameters",
        file=sys.stderr,
    )
    return learner, settings


def _restore(learner: Learner, checkpoint: Checkpoint) -> None:
    learner.model.load_adapter_state(checkpoint.adapter)
    for name, weight in learner.ema.weights.items():
        weight.copy_(checkpoint.ema[name])
    load_optimizer(learner.optimizer, list(learner.parameters), checkpoint.optimizer)


def _validate(learner: Learner, validate: Validate, step: int) -> dict[str, float]:
    with learner.ema.swapped_in(learner.model):
        return validate(learner.model, step)


def _quality(found: Mapping[str, float]) -> float:
    return found["corrected"] if "corrected" in found else found["reward"]
