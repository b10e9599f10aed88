"""The step of an objective that learns from the stochastic steps that sampled the images."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gdro.objectives.base import Transition
from gdro.samplers.sde import STEPS, kl_scale, log_prob, ratio_scale
from gdro.training.draws import GroupDraw
from gdro.training.learner import Learner
from gdro.training.transitions import TransitionBatch


def calls(learner: Learner, draws: Sequence[GroupDraw]) -> int:
    """Velocity evaluations in a step of these draws; one with gradient counts as three."""
    objective, fresh = learner.objective, learner.data.fresh(draws[0].step)
    others = objective.uses_base + (objective.uses_old_mean and not fresh)
    return len(draws) * learner.config.k * learner.data.transitions.count(draws[0]) * (3 + others)


def backward(learner: Learner, draws: Sequence[GroupDraw], ranked: int) -> dict[str, Tensor]:
    """Add the gradient of the sum of loss / ranked over draws; return the same sums of the metrics.

    Each stochastic step is a batch of its own, so memory does not grow with their number. If the images do not fit
    either, they are split: an image's loss depends on no other image's velocity.
    """
    count, batches = learner.data.transitions.of(draws)
    fresh = learner.data.fresh(draws[0].step)
    totals: dict[str, Tensor] = {}
    for some in (batch[part] for batch in batches for part in learner.passes(len(batch.t))):
        share = some.ranked / (ranked * count * learner.config.k)
        loss, figures = learner.objective.loss(transition(learner, some, fresh=fresh))
        (loss * share).sum().backward()
        for name, value in {"loss": loss.detach(), **figures}.items():
            totals[name] = totals.get(name, torch.zeros((), device=share.device)) + (value * share).sum()
    return totals


def transition(learner: Learner, batch: TransitionBatch, *, fresh: bool) -> Transition:
    """The step's Gaussian under the current policy, and the means under base and sampler that the objective uses.

    `fresh`: nothing was learned since sampling, so the old log-probability is the policy's own and the ratio exactly 1.
    """
    objective, sampler = learner.objective, learner.data.sampler
    step: Callable[..., tuple[Tensor, Tensor]] = STEPS[sampler]

    def moments() -> tuple[Tensor, Tensor]:
        velocity = learner.policies.velocity(batch.x, batch.t, batch.text)
        return step(batch.x, velocity, batch.t, batch.t_next, learner.data.noise_level)

    def mean_of(name: str) -> Tensor:
        with torch.no_grad(), learner.policies.carrying(name):
            return moments()[0]

    base_mean = mean_of("base") if objective.uses_base else None
    old_mean = mean_of("old") if objective.uses_old_mean and not fresh else None
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
        ratio_scale=ratio_scale(sampler, std),
        kl_scale=kl_scale(sampler, batch.t_next - batch.t),
    )
