"""One optimizer step: what it reads, its gradient under either kind of objective, its update, its figures."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gdro.common import distributed
from gdro.common.errors import UserError
from gdro.models.base import FlowModel, Text
from gdro.objectives.base import ForwardObjective, Noised, TrajectoryObjective, Transition, velocity_error
from gdro.samplers.sde import STEPS, kl_scale, log_prob, ratio_scale
from gdro.training.batch import Batch, Batches, Visit, Visits, dealt, of_one_size
from gdro.training.config import TrainConfig
from gdro.training.ema import Ema, carrying, ema_decay
from gdro.training.reference import ReferenceErrors
from gdro.training.transitions import TransitionBatch, Transitions

VISIBLE = 1e-2  # a weight of an adapter that shows in any precision


@dataclass(frozen=True)
class Portion:
    """How much of a step goes through the model at once. It decides on memory and speed, not on the gradient."""

    groups: int
    images: int | None = None  # of these groups at once, each going back in a second pass; None: all, in one pass

    def images_of(self, k: int) -> int:
        return self.images or self.groups * k


@dataclass
class Learner:
    """Everything a step reads and changes."""

    config: TrainConfig
    objective: ForwardObjective | TrajectoryObjective
    model: FlowModel
    geometry: dict[str, Any]  # guidance_scale as the groups were made with; height and width once `at` a group
    parameters: dict[str, torch.nn.Parameter]
    visits: Visits
    batches: Batches
    transitions: Transitions
    optimizer: torch.optim.Optimizer
    ema: Ema
    portion: Portion
    reference_errors: ReferenceErrors | None  # None: the reference is asked at each visit
    sampler: str  # how the groups were sampled; a trajectory objective repeats its steps
    noise_level: float
    done: int = 0  # steps before the round: at the next one the policy is still the one that sampled
    behavior: Mapping[str, Tensor] | None = None  # the adapter that sampled the round; None: the base

    def at(self, group: str) -> "Learner":
        """The same for images of that group's size."""
        height, width = self.batches.groups.image_size(group)
        return replace(self, geometry=self.geometry | {"height": height, "width": width})

    def velocity(self, x_t: Tensor, t: Tensor, text: Any) -> Tensor:
        return self.model.velocity(x_t, t, text, **self.geometry)

    def passes(self, images: int) -> list[slice]:
        """Which of so many images go through the model together."""
        size = self.portion.images or images
        return [slice(first, first + size) for first in range(0, images, size)]

    @contextmanager
    def carrying(self, reference: str) -> Iterator[None]:
        """Inside it the model is the frozen base, the round's sampler, the moving average, or the policy as it is."""
        if reference == "policy":
            yield
            return
        if reference == "base" or (reference == "round" and self.behavior is None):
            with self.model.adapter_disabled():
                yield
            return
        with carrying(self.model, self.ema.weights if reference == "ema" else self.behavior or {}):
            yield


def train_step(learner: Learner, step: int) -> dict[str, float]:
    """One update of the adapter and its EMA; the step's figures, means over the groups that carry a ranking.

    Several processes share the groups and make the same update.
    A step without any such group costs nothing and changes nothing but the EMA. Raises UserError, before anything is
    changed, if the loss or gradient is not finite.
    """
    config = learner.config
    visits = learner.visits.at(step)
    ranked = sum(visit.ranked for visit in visits)
    own = dealt(visits, distributed.rank(), distributed.size()) if ranked else []
    spent = nfe(learner, visits) if ranked else 0
    totals: dict[str, Tensor] = {}
    for some in of_one_size(own, learner.batches.groups, _groups_at_once(learner, visits)):
        figures = backward(learner, some, ranked)
        totals = {name: totals[name] + value for name, value in figures.items()} if totals else figures
    means: dict[str, float] = {"nfe": 0}
    if ranked:
        if learner.reference_errors is not None:
            learner.reference_errors.share()
        distributed.sum_gradients(learner.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(learner.parameters.values(), config.max_grad_norm)
        *sums, grad_norm = torch.stack([*totals.values(), norm]).tolist()
        means = distributed.summed(dict(zip(totals, sums, strict=True)))
        means |= {"nfe": spent, "grad_norm": grad_norm}
    for name in {"loss", "grad_norm"} & set(means):  # read above at once: the only synchronization with a GPU
        if not math.isfinite(means[name]):
            raise UserError(
                f"train.learning_rate: {config.learning_rate}: the {name.replace('grad_norm', 'gradient norm')} is "
                f"{means[name]} at step {step}; expected a finite number. Try a smaller rate with another --out; "
                "copy groups/ and rewards/ there"
            )
    if ranked:
        learner.optimizer.step()
        learner.optimizer.zero_grad()
    learner.ema.update(learner.parameters, ema_decay(step, warmup=config.ema_warmup, decay=config.ema_decay))
    return {"groups": ranked, **means}


def nfe(learner: Learner, visits: Sequence[Visit]) -> int:
    """What a step of these visits costs (`FlowModel.nfe`), by what they draw: one process, one pass.

    Which budget a run has spent, and so where it ends, must not depend on how memory divides a step (a second pass is
    not counted, as recomputed activations are not), on the number of processes, or on what a killed one computed.
    """
    objective, fresh = learner.objective, visits[0].step == learner.done + 1
    images, once = len(visits) * learner.config.k, 0
    if objective.kind == "trajectory":
        images *= learner.transitions.count(visits[0])
        others = objective.uses_base + (objective.uses_old_mean and not fresh)
    elif learner.reference_errors is not None:
        others = int(objective.uses_base)
        once = learner.reference_errors.missing(visits, [learner.batches.draw(visit) for visit in visits])
    else:
        known = objective.uses_reference is None or (learner.config.reference == "round" and fresh)
        others = objective.uses_base + (not known)
    return (images * (3 + others) + once) * learner.model.passes(learner.geometry["guidance_scale"])


def _groups_at_once(learner: Learner, visits: Sequence[Visit]) -> int:
    """As the portion says; one where processes that only compute together may have other sizes of images each."""
    sizes = {learner.batches.groups.image_size(visit.group) for visit in visits}
    return 1 if len(sizes) > 1 and distributed.is_sharded(learner.model.transformer) else learner.portion.groups


def backward(learner: Learner, visits: Sequence[Visit], ranked: int) -> dict[str, Tensor]:
    """Add the gradient of sum over `visits`, of one size, of loss / ranked; return the same sums of the figures.

    A visit whose k rewards are all equal counts for nothing: it has no ranking and no best image.
    """
    learner = learner.at(visits[0].group)
    if learner.objective.kind == "trajectory":
        return _backward_along(learner, learner.objective, visits, ranked)
    return _backward_noised(learner, learner.objective, visits, ranked)


def _backward_noised(
    learner: Learner, objective: ForwardObjective, visits: Sequence[Visit], ranked: int
) -> dict[str, Tensor]:
    batch = learner.batches.of(visits)
    reference: str | None = learner.config.reference if objective.uses_reference else None
    if reference == "round" and visits[0].step == learner.done + 1:
        reference = "policy"  # nothing was learned since sampling
    if learner.reference_errors is not None:
        seen = noised(learner, batch, base=objective.uses_base, reference=None)
        seen = replace(seen, reference_error=_reference_error(learner, learner.reference_errors, visits, batch))
    else:
        seen = noised(learner, batch, base=objective.uses_base, reference=reference)
    loss, figures = objective.loss(seen)
    share = batch.ranked / ranked
    total = (loss * share).sum()
    if learner.portion.images is None:
        total.backward()
    else:
        _second_pass(learner, batch, *torch.autograd.grad(total, seen.policy))
    figures = {"loss": loss.detach(), **figures}
    if objective.uses_reference:
        drift = (seen.d - seen.d_ref).detach()
        figures |= {"drift_best": drift[:, 0], "drift_worst": drift[:, -1], "error_best": seen.d[:, 0].detach()}
    return {name: (value * share).sum() for name, value in figures.items()}


def _reference_error(learner: Learner, known: ReferenceErrors, visits: Sequence[Visit], batch: Batch) -> Tensor:
    """d_ref (g, k) of the pool's draws; those not known yet are computed, and kept."""
    draws = [learner.batches.draw(visit) for visit in visits]
    errors = known.of(visits, draws)
    asked = errors.isnan()
    if distributed.is_sharded(learner.model.transformer):  # all its processes compute, or none
        asked[:] = any(distributed.gather(bool(asked.any())))
    if asked.any():
        rows = asked.flatten().nonzero()[:, 0].to(learner.model.device)
        v = (batch.eps - batch.x0).flatten(0, 1)[rows]
        with torch.no_grad(), learner.carrying("base"):
            found = velocity_error(v, _velocities(learner, *_rows(*batch.noised(), rows)))
        errors[asked] = found.cpu()
        known.keep(visits, draws, errors)
    return errors.to(learner.model.device)


def _velocities(learner: Learner, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
    """(n, tokens, channels), as many images at a time as the portion says."""
    return torch.cat([learner.velocity(*_rows(x_t, t, text, part)) for part in learner.passes(len(t))])


def _rows(x_t: Tensor, t: Tensor, text: Text, rows: slice | Tensor) -> tuple[Tensor, Tensor, Text]:
    return x_t[rows], t[rows], {name: value[rows] for name, value in text.items()}


def _second_pass(learner: Learner, batch: Batch, gradient: Tensor) -> None:
    """Take the loss's gradient (g, k, tokens, channels) with respect to the policy's velocities on to its weights.

    A group's loss joins its images through their velocities alone, so once its gradient with respect to those is known
    each image can go back by itself: the gradient of one pass over all, in the memory of a few.
    """
    x_t, t, text, gradient = *batch.noised(), gradient.flatten(0, 1)
    for part in learner.passes(len(t)):
        learner.velocity(*_rows(x_t, t, text, part)).backward(gradient[part])


def _backward_along(
    learner: Learner, objective: TrajectoryObjective, visits: Sequence[Visit], ranked: int
) -> dict[str, Tensor]:
    """Each stochastic step is a batch of its own, so memory does not grow with their number.

    Nor with that of the images, if they do not fit: an image's loss depends on no other image's velocity.
    """
    count, batches = learner.transitions.of(visits)
    fresh = visits[0].step == learner.done + 1
    totals: dict[str, Tensor] = {}
    for some in (batch[part] for batch in batches for part in learner.passes(len(batch.t))):
        share = some.ranked / (ranked * count * learner.config.k)
        loss, figures = objective.loss(transition(learner, objective, some, fresh=fresh))
        (loss * share).sum().backward()
        for name, value in {"loss": loss.detach(), **figures}.items():
            totals[name] = totals.get(name, torch.zeros((), device=share.device)) + (value * share).sum()
    return totals


def noised(learner: Learner, batch: Batch, *, base: bool, reference: str | None) -> Noised:
    """The velocities of policy, reference and base on the same x_t; only the policy's with gradient.

    reference: whose weights (`Learner.carrying`), "policy" for the policy's own velocities, None for none. If the
    images do not go through the model at once, the policy's velocities are a leaf of the graph (`_second_pass`).
    """
    shape = batch.x0.shape
    x_t, t, text = batch.noised()

    def velocity(kind: str) -> Tensor:
        with learner.carrying(kind):
            return _velocities(learner, x_t, t, text).view(shape)

    with torch.no_grad():
        other = None if reference in (None, "policy") else velocity(reference)
        of_base = velocity("base") if base else None
    if learner.portion.images is None:
        policy = velocity("policy")
    else:
        with torch.no_grad():
            policy = velocity("policy")
        policy.requires_grad_()
    return Noised(
        rewards=batch.rewards,
        advantages=batch.advantages,
        t=t.view(shape[:2]),
        x_t=x_t.view(shape),
        v=batch.eps - batch.x0,
        policy=policy,
        reference=policy.detach() if reference == "policy" else other,
        base=of_base,
    )


def transition(learner: Learner, objective: TrajectoryObjective, batch: TransitionBatch, *, fresh: bool) -> Transition:
    """The step's Gaussian under the policy as it is, and the means under base and sampler that the objective uses.

    `fresh`: nothing was learned since sampling, so the old log-probability is the policy's own and the ratio exactly 1.
    """
    step: Callable[..., tuple[Tensor, Tensor]] = STEPS[learner.sampler]

    def moments() -> tuple[Tensor, Tensor]:
        velocity = learner.velocity(batch.x, batch.t, batch.text)
        return step(batch.x, velocity, batch.t, batch.t_next, learner.noise_level)

    def mean_of(kind: str) -> Tensor:
        with torch.no_grad(), learner.carrying(kind):
            return moments()[0]

    base_mean = mean_of("base") if objective.uses_base else None
    old_mean = mean_of("round") if objective.uses_old_mean and not fresh else None
    mean, std = moments()
    now = log_prob(batch.x_next, mean, std)
    old = batch.log_prob if old_mean is None else log_prob(batch.x_next, old_mean, std.detach())
    return Transition(
        log_prob=now,
        old_log_prob=now.detach() if fresh else old,
        advantage=batch.advantages,
        mean=mean,
        base_mean=base_mean,
        old_mean=mean.detach() if objective.uses_old_mean and fresh else old_mean,
        std=std,
        dt=batch.t_next - batch.t,
        ratio_scale=ratio_scale(learner.sampler, std),
        kl_scale=kl_scale(learner.sampler, batch.t_next - batch.t),
    )


def check_reference(learner: Learner, step: int, figures: Mapping[str, float]) -> None:
    """Raise RuntimeError unless the update of `step` left policy and base two models, the base unmoved.

    `step` must have had a visit with a ranking, or there was no update. A model compiled or patched wrongly can return
    adapted outputs while its adapter is disabled. At step 1 the ranking loss must have been that of policy = reference.
    """
    objective = learner.objective
    expected = objective.start_loss(learner.config.k) if objective.kind == "forward" else None
    if step == 1 and expected is not None and abs(figures["loss_rank"] - expected) > 1e-3:
        raise RuntimeError(
            f"the loss at step 1 is {figures['loss_rank']}, not {expected}: policy and reference differ at the start"
        )
    # the same shape as the step had: another would be compiled anew, and pass or fail for itself
    visits = next(of_one_size(learner.visits.at(step), learner.batches.groups, learner.portion.groups))
    learner = learner.at(visits[0].group)
    own = {name: value.detach() for name, value in learner.parameters.items()}
    largest = max(float(value.abs().max()) for name, value in own.items() if "lora_B" in name)
    scale = max(2.0, VISIBLE / largest) if largest else 2.0  # a small learning rate's update shows in bfloat16 as well
    with torch.no_grad():
        batch = learner.batches.of(visits)
        seen = noised(learner, batch, base=True, reference=None)
        with carrying(learner.model, {name: value * (scale if "lora_B" in name else 1) for name, value in own.items()}):
            again = noised(learner, batch, base=True, reference=None)
    gap = (again.d - again.d_base).abs().max()
    if gap == 0:
        raise RuntimeError("after an update the policy equals the reference: the adapter has no effect")
    if (again.d_base - seen.d_base).abs().max() > 0.1 * gap:
        raise RuntimeError("the reference moves with the adapter: disabling the adapter has no effect")
