"""Stage 3: train a LoRA on the scored groups of a round, with any objective.

Features: forward objectives on noised images and trajectory objectives on stored sampling steps; any number of groups
per step by gradient accumulation; EMA; exact resumption, in any round; validation that keeps the best checkpoint; stops
at a target or a budget; several processes, which share the groups of each step.
Limits: one prompt length per store, one image size per group; the learning rate is constant.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdro.common import distributed
from gdro.common.errors import UserError
from gdro.common.files import fingerprint, sweep
from gdro.common.progress import Progress, say
from gdro.common.sealed import find_record
from gdro.groups.sampling import STARTED
from gdro.groups.scores import read_rewards
from gdro.groups.store import GroupStore
from gdro.models.base import FlowModel
from gdro.objectives.registry import source_version
from gdro.training.batches import Batches
from gdro.training.checkpoint import (
    Checkpoint,
    check_settings,
    checkpoint_path,
    find_checkpoint,
    load_checkpoint,
    load_optimizer,
    mark_best,
    mark_stopped,
    optimizer_tensors,
    prune_checkpoints,
    save_checkpoint,
)
from gdro.training.config import MAY_CHANGE, TrainConfig
from gdro.training.draws import GroupDraws
from gdro.training.joined import Joined
from gdro.training.learner import Data, Learner
from gdro.training.log import LOG, DriftAlarm, MetricsLog, require_trackers
from gdro.training.micro_batch import choose_micro_batch, configured_micro_batch
from gdro.training.policies import Policies, carrying
from gdro.training.reference import ReferenceErrors
from gdro.training.step import check_reference, train_step
from gdro.training.transitions import Transitions

Validate = Callable[[FlowModel, int], dict[str, float]]


@dataclass(frozen=True)
class Round:
    """A round's place in the run. The defaults describe the only round of an offline run."""

    number: int = 0
    done: int = 0  # optimizer steps before it
    last: int | None = None  # its last step; None: the run's
    kept: Sequence[tuple[Path, Path]] = ()  # (groups, rewards) of earlier rounds also trained on
    behavior_policy: str = "policy"  # the weights that sampled it
    sampled: int = 0  # model evaluations spent on sampling so far, including this round
    ahead: int = 0  # model evaluations for sampling the next round
    seconds: Callable[[], Mapping[str, float]] = dict  # wall seconds by stage so far, for the log


def train(
    config: TrainConfig,
    model: FlowModel,
    groups: str | Path,
    rewards: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    sampling: Mapping[str, Any] | None = None,
    validate: Validate | None = None,
    round: Round | None = None,
) -> None:
    """Train an adapter on the store `groups` with the scores in the file `rewards`, to the end of the round.

    Writes `out`/metrics.jsonl and `out`/checkpoints, and resumes from the latter. `sampling` holds the settings
    training and generation must share (guidance_scale, max_sequence_length; height, width and buckets), and for
    trajectory objectives sampler and noise_level; it defaults to what the store was made with.
    `validate(model, step)` measures the current model: "corrected" or, without a judge, "reward" decides which
    checkpoint is best. Raises UserError for bad input before any work, and if the loss becomes infinite or NaN.
    """
    place, groups, rewards, out = round or Round(), Path(groups), Path(rewards), Path(out)
    learner, settings = prepare(config, model, groups, rewards, seed=seed, sampling=sampling, round=place)
    folder = out / "checkpoints"
    checkpoint = find_checkpoint(folder, config.resume_from_checkpoint, config.max_train_steps)
    start = 0
    memory: dict[str, Any] = {"best": None, "alarm": {}, "nfe": 0}
    if checkpoint is not None:
        _check_same(checkpoint, settings, place)
        _restore(learner, checkpoint)
        start, memory = checkpoint.step, checkpoint.memory
    model.free()  # the store has everything that text encoders and VAE would make
    learner.micro_batch = choose_micro_batch(learner, memory.get("micro_batch"))
    if place.done:
        old = behavior_weights(folder, place)
        _check_sampler(model, old, GroupStore(groups))
        learner.policies.adapters["old"] = old
    alarm, best = DriftAlarm(config.alarm_drift, **memory["alarm"]), memory["best"]
    spent: int = memory["nfe"]
    validate = validate if config.validation_steps else None
    images, checked = config.groups_per_step * config.k, bool(place.number)
    known = learner.data.reference_errors
    until = config.max_train_steps if place.last is None else place.last
    distributed.wait()  # all have read the checkpoint
    if distributed.is_first():
        sweep(folder)
        mark_best(folder, best)

    own = checkpoint is not None and checkpoint.path.resolve().parent == folder.resolve()  # then the log is here too
    log = MetricsLog(
        out / LOG,
        resumed=start if checkpoint else None,
        rows=memory["rows"] if own else None,
        report_to=config.report_to,
    )
    with log, Progress(_label(place), until, "step", done=start) as progress:

        def validated(step: int) -> dict[str, Any]:
            cost = {"nfe": {"sample": place.sampled, "train": spent}, "seconds": dict(place.seconds())}
            with learner.policies.carrying("ema"):
                found = validate(model, step) if validate else {}
            if validate:
                model.free()
            log.write(step, found | cost, under="validation")
            return found

        if validate and not start:
            validated(0)
        for step in range(start + 1, until + 1):
            began = time.perf_counter()
            figures = train_step(learner, step)
            spent += int(figures.pop("nfe"))
            ringing = alarm.update(step, figures["drift_best"], figures["error_best"]) if "error_best" in figures else 0
            seconds = time.perf_counter() - began
            speed = {"images_per_second": images / seconds, "seconds": seconds, "alarm": bool(ringing)}
            log.write(step, {"round": place.number, **figures, "lr": config.learning_rate, **speed})
            if not checked and figures["groups"]:
                check_reference(learner, step, figures)
                checked = True

            reason = over(config, place, step, spent)
            found, improved = None, False
            if validate and (reason or step % config.validation_steps == 0):
                found = validated(step)
                improved = best is None or _quality(found) > _quality(best)
                best = {"step": step, **found} if improved else best
                if config.target_reward is not None and found["reward"] >= config.target_reward:
                    reason = reason or "target_reward"
            if reason or step == until or improved or step % config.checkpointing_steps == 0:
                remembered = {
                    "best": best,
                    "alarm": {"window": list(alarm.window), "on": alarm.on},
                    "nfe": spent,
                    "micro_batch": asdict(learner.micro_batch),
                    "rows": log.rows,
                }
                if distributed.is_first():
                    log.sync()
                    mark_best(folder, best)
                    if reason:
                        mark_stopped(folder, step, reason, config)
                save_checkpoint(
                    folder,
                    step,
                    adapter=learner.policies.parameters,
                    ema=learner.policies.adapters["ema"],
                    optimizer=optimizer_tensors(learner.optimizer, list(learner.policies.parameters)),
                    reference=None if known is None else known.state(),
                    settings=settings,
                    memory=remembered,
                )
                if distributed.is_first():
                    needed = {best["step"] if best else None, place.done}
                    prune_checkpoints(folder, limit=config.checkpoints_total_limit, needed=needed)
            progress.advance(1, **{name: figures[name] for name in ("loss", "drift_best", "kl") if name in figures})
            if reason:
                return


def prepare(
    config: TrainConfig,
    model: FlowModel,
    groups: Path,
    rewards: Path,
    *,
    seed: int,
    sampling: Mapping[str, Any] | None = None,
    round: Round | None = None,
) -> tuple[Learner, dict[str, Any]]:
    """The learner before the round's first step, and the settings a resumed run must share.

    Raises UserError if the groups, scores and model cannot be trained on.
    """
    place = round or Round()
    require_trackers(config.report_to)
    scores: dict[str, Tensor] = {}
    files = [*place.kept, (groups, rewards)]
    stores = [GroupStore(folder) for folder, _ in files]
    if sampling is None:
        sampling = own_sampling(stores[-1])
        if "sampler" in sampling and "noise_level" not in sampling:
            raise UserError(f"{groups} lacks {STARTED}, which says how noisy its steps were; expected `sampling`")
    for store, (folder, file) in zip(stores, files, strict=True):
        check_sampling(store, sampling)
        if store.settings["revision"].partition("+")[0] != model.revision:  # "+" precedes the digest of an adapter
            raise UserError(
                f"model: {model.name} has revision {model.revision!r}, but the groups in {folder} were made with "
                f"{store.settings['revision']!r}; training must use the same"
            )
        scores |= read_rewards(file, store)
    store = stores[-1]
    objective: Any = config.objective
    if "trajectories" in objective.needs:
        store.trajectory(store.group_ids[0])  # raises if there is none
    draws = GroupDraws(
        scores,
        k=config.k,
        subset=config.subset,
        groups_per_step=config.groups_per_step,
        seed=seed,
        advantage=getattr(objective, "advantage", None),
        advantage_exponent=getattr(objective, "advantage_exponent", 0.0),
        min_spread=config.min_spread,
        max_mean=config.max_mean,
        done=place.done,
        once="trajectories" in objective.needs,
    )
    if not draws.rewards and place.last is None:  # if more rounds follow, this one merely teaches nothing
        raise UserError(f"{rewards}: all {len(scores)} groups are left out ({_reasons(draws)}); expected some spread")
    for (height, width), group in {store.image_size(group): group for group in store.group_ids}.items():
        expected, found = model.latent_shape(height, width), tuple(store.latents(group).shape[1:])
        if found != expected:
            raise UserError(
                f"model: {model.name} has latents {expected} at {width}x{height}, those in {groups} are {found}"
            )

    if not place.number or not model.adapter():  # later rounds keep the adapter in use, with a checkpoint's weights
        model.add_adapter(rank=config.rank, alpha=config.lora_alpha, targets=config.target_modules, seed=seed)
    parameters = model.adapter()
    model.checkpoint_activations(config.gradient_checkpointing)
    joined = Joined(stores)
    data = Data(
        groups=joined,
        draws=draws,
        batches=Batches(
            joined,
            timestep=config.timestep,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            timestep_scope=config.timestep_scope,
            noise_scope=config.noise_scope,
            memory_bytes=config.memory_gigabytes * 1e9,
            device=model.device,
            seed=seed,
            pool=config.reference_draws,
        ),
        transitions=Transitions(joined, fraction=config.timestep_fraction, device=model.device, seed=seed),
        reference_errors=None if config.reference_draws is None else ReferenceErrors(stores, config.reference_draws),
        sampler=sampling.get("sampler", "ode"),
        noise_level=sampling.get("noise_level") or 0.0,
    )
    policies = Policies(
        model,
        conditioning={"guidance_scale": store.settings["guidance_scale"]},
        adapters={"ema": {name: parameter.detach().clone() for name, parameter in parameters.items()}},
    )
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    learner = Learner(config, data, policies, optimizer, configured_micro_batch(config))
    settings = {f"train.{name}": value for name, value in config.flat().items()}
    settings |= {
        "seed": seed,
        "objective": source_version(objective),
        "model": model.revision,
        "mixed_precision": "bf16" if next(model.transformer.parameters()).dtype == torch.bfloat16 else "no",
        "round": place.number,
        "groups": fingerprint([one.contents for one in stores] if place.kept else store.contents),
        "rewards": fingerprint({group: values.tolist() for group, values in scores.items()}),
    }
    say(
        f"{_label(place)}: {len(draws.rewards)} groups, {draws.excluded.total()} left out ({_reasons(draws)}); "
        f"{config.groups_per_step} groups x {config.k} images per step, "
        f"{sum(p.numel() for p in parameters.values())} parameters"
    )
    return learner, settings


def check_sampling(store: GroupStore, sampling: Mapping[str, Any]) -> None:
    """Raise UserError if `store` was made with settings other than `sampling`."""
    made = own_sampling(store)
    for field, value in sampling.items():
        if field in made and made[field] != value:
            raise UserError(
                f"sample.{field}: {value!r}, but the groups in {store.folder} were made with "
                f"{made[field]!r}; training must use the same"
            )
    if "height" in sampling:
        sizes = [[sampling["height"], sampling["width"]], *sampling.get("buckets", [])]
        for group in store.group_ids:
            height, width = store.image_size(group)
            if [height, width] not in sizes:
                raise UserError(
                    f"sample.height, sample.width: {', '.join(f'{w}x{h}' for h, w in sizes)}, but group {group} in "
                    f"{store.folder} is {width}x{height}; training must use the same, or list it in sample.buckets"
                )


def own_sampling(store: GroupStore) -> dict[str, Any]:
    """The store's settings, including how its trajectories, if any, were sampled: training repeats their steps."""
    if not store.has_trajectories:
        return dict(store.settings)
    begun = find_record(store.folder / STARTED)
    level = begun["settings"]["noise_level"] if begun else None
    own = {**store.settings, "sampler": store.shards[0].sampler}
    return own if level is None else own | {"noise_level": level}


def behavior_weights(folder: Path, round: Round) -> Mapping[str, Tensor]:
    """The adapter that samples a later round: from the checkpoint in `folder` that ended the previous one."""
    checkpoint = load_checkpoint(checkpoint_path(folder, round.done))
    return checkpoint.ema if round.behavior_policy == "ema" else checkpoint.adapter


def _check_sampler(model: FlowModel, weights: Mapping[str, Tensor], store: GroupStore) -> None:
    """Raise UserError if a later round was sampled by weights other than `weights`."""
    with carrying(model, weights):
        expected = model.fingerprint
    if store.settings["revision"] != expected:
        raise UserError(
            f"{store.folder} was sampled by the weights {store.settings['revision']}, not by those that ended the "
            f"previous round, {expected}; delete {store.folder.parent} to resample the round"
        )


def _check_same(checkpoint: Checkpoint, settings: Mapping[str, Any], round: Round) -> None:
    """A checkpoint of this round was trained on the same groups; the one that ended the previous round, on others."""
    others = frozenset({"round", "groups", "rewards"}) if checkpoint.step == round.done else frozenset()
    check_settings(checkpoint, settings, MAY_CHANGE | others)


def _restore(learner: Learner, checkpoint: Checkpoint) -> None:
    policies, known = learner.policies, learner.data.reference_errors
    policies.model.load_adapter_state(checkpoint.adapter)
    for name, weight in policies.adapters["ema"].items():
        weight.copy_(checkpoint.ema[name])
    load_optimizer(learner.optimizer, list(policies.parameters), checkpoint.optimizer)
    if known is not None:
        known.load(checkpoint.reference)


def over(config: TrainConfig, round: Round, step: int, spent: int) -> str:
    """Why the run ends at this step of the round, after training cost `spent` model evaluations; "" if it does not.

    No round starts if its sampling alone would reach the budget.
    """
    if step >= config.max_train_steps:
        return "max_train_steps"
    evaluations = round.sampled + spent + (round.ahead if step == round.last else 0)
    if config.max_nfe is not None and evaluations >= config.max_nfe:
        return "max_nfe"
    return ""


def _quality(found: Mapping[str, float]) -> float:
    return found["corrected"] if "corrected" in found else found["reward"]


def _reasons(draws: GroupDraws) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in draws.excluded.most_common()) or "none"


def _label(round: Round) -> str:
    return "train" if round.last is None else f"train round {round.number}"
