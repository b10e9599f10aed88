"""The step of an objective that learns from newly noised images."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gdro.common import distributed
from gdro.models.base import Text
from gdro.objectives.base import Noised
from gdro.objectives.flow import velocity_error
from gdro.training.batches import Batch
from gdro.training.draws import GroupDraw
from gdro.training.learner import Learner
from gdro.training.reference import ReferenceErrors


def calls(learner: Learner, draws: Sequence[GroupDraw]) -> int:
    """Velocity evaluations in a step of these draws; one with gradient counts as three."""
    objective, known, once = learner.objective, learner.data.reference_errors, 0
    images = len(draws) * learner.config.k
    others = int(objective.uses_base)
    if known is not None:
        once = known.missing(draws, [learner.data.batches.pool_index(draw) for draw in draws])
    elif objective.uses_reference is not None:
        others += not (objective.reference == "old" and learner.data.fresh(draws[0].step))
    return images * (3 + others) + once


def backward(learner: Learner, draws: Sequence[GroupDraw], ranked: int) -> dict[str, Tensor]:
    """Add the gradient of the sum of loss / ranked over draws; return the same sums of the metrics."""
    objective, known = learner.objective, learner.data.reference_errors
    batch = learner.data.batches.of(draws)
    reference: str | None = objective.reference if objective.uses_reference else None
    if reference == "old" and learner.data.fresh(draws[0].step):
        reference = "policy"
    seen = noised(learner, batch, base=objective.uses_base, reference=reference if known is None else None)
    if known is not None:
        seen = replace(seen, reference_error=_reference_error(learner, known, draws, batch))
    loss, figures = objective.loss(seen)
    share = batch.ranked / ranked
    total = (loss * share).sum()
    if learner.micro_batch.images is None:
        total.backward()
    else:
        _second_pass(learner, batch, *torch.autograd.grad(total, seen.policy))
    figures = {"loss": loss.detach(), **figures}
    if objective.uses_reference:
        drift = (seen.d - seen.d_ref).detach()
        figures |= {"drift_best": drift[:, 0], "drift_worst": drift[:, -1], "error_best": seen.d[:, 0].detach()}
    return {name: (value * share).sum() for name, value in figures.items()}


def noised(learner: Learner, batch: Batch, *, base: bool, reference: str | None) -> Noised:
    """The velocities of policy, reference and base on the same x_t; only the policy's have a gradient.

    reference: a name for `Policies.carrying`, "policy" for the policy's own velocities, or None. If the images do not
    all go through the model at once, the policy's velocities are a leaf of the graph (`_second_pass`).
    """
    shape = batch.x0.shape
    x_t, t, text = batch.noised()

    def velocity(name: str) -> Tensor:
        with learner.policies.carrying(name):
            return _velocities(learner, x_t, t, text).view(shape)

    with torch.no_grad():
        other = None if reference in (None, "policy") else velocity(reference)
        of_base = velocity("base") if base else None
    if learner.micro_batch.images is None:
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
        v=batch.v,
        policy=policy,
        reference=policy.detach() if reference == "policy" else other,
        base=of_base,
    )


def _reference_error(learner: Learner, known: ReferenceErrors, draws: Sequence[GroupDraw], batch: Batch) -> Tensor:
    """d_ref (g, k) of the pool's draws; unknown ones are computed and kept."""
    places = [learner.data.batches.pool_index(draw) for draw in draws]
    errors = known.of(draws, places)
    asked = errors.isnan()
    if distributed.is_sharded(learner.policies.model.transformer):  # all of its processes compute, or none
        asked[:] = any(distributed.gather(bool(asked.any())))
    if asked.any():
        rows = asked.flatten().nonzero()[:, 0].to(learner.policies.model.device)
        with torch.no_grad(), learner.policies.carrying("base"):
            velocities = _velocities(learner, *_rows(*batch.noised(), rows))
        errors[asked] = velocity_error(batch.v.flatten(0, 1)[rows], velocities).cpu()
        known.keep(draws, places, errors)
    return errors.to(learner.policies.model.device)


def _velocities(learner: Learner, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
    """Velocities (n, tokens, channels), computed in the micro-batch's passes."""
    return torch.cat([learner.policies.velocity(*_rows(x_t, t, text, part)) for part in learner.passes(len(t))])


def _rows(x_t: Tensor, t: Tensor, text: Text, rows: slice | Tensor) -> tuple[Tensor, Tensor, Text]:
    return x_t[rows], t[rows], {name: value[rows] for name, value in text.items()}


def _second_pass(learner: Learner, batch: Batch, gradient: Tensor) -> None:
    """Propagate the loss's gradient (g, k, tokens, channels) from the policy's velocities to its weights.

    A group's loss couples its images only through their velocities. Once the gradient with respect to those is known,
    each image can be backpropagated separately: the gradient of one pass over all, in the memory of a few.
    """
    x_t, t, text, gradient = *batch.noised(), gradient.flatten(0, 1)
    for part in learner.passes(len(t)):
        learner.policies.velocity(*_rows(x_t, t, text, part)).backward(gradient[part])
