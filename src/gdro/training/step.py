"""One optimizer step: its gradient under any objective, its update, its metrics."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gdro.common import distributed
from gdro.common.errors import UserError
from gdro.training.draws import GroupDraw, of_one_size, split
from gdro.training.learner import Learner
from gdro.training.policies import carrying, ema_decay, ema_update
from gdro.training.steps import step_of
from gdro.training.steps.forward import noised

VISIBLE = 1e-2  # an adapter weight large enough to show in any precision


def train_step(learner: Learner, step: int) -> dict[str, float]:
    """Update the adapter and its EMA once; returns the step's metrics, averaged over the groups with a ranking.

    Several processes share the groups and make the same update. A step without any such group costs nothing and
    changes only the EMA. Raises UserError, before changing anything, if the loss or gradient is not finite.
    """
    config, data, parameters = learner.config, learner.data, learner.policies.parameters
    draws = data.draws.at(step)
    ranked = sum(draw.ranked for draw in draws)
    own = split(draws, distributed.rank(), distributed.size()) if ranked else []
    spent = nfe(learner, draws) if ranked else 0
    totals: dict[str, Tensor] = {}
    for some in of_one_size(own, data.groups, _groups_at_once(learner, draws)):
        figures = backward(learner, some, ranked)
        totals = {name: totals[name] + value for name, value in figures.items()} if totals else figures
    means: dict[str, float] = {"nfe": 0}
    if ranked:
        if data.reference_errors is not None:
            data.reference_errors.share()
        distributed.sum_gradients(parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        *sums, grad_norm = torch.stack([*totals.values(), norm]).tolist()
        means = distributed.summed(dict(zip(totals, sums, strict=True)))
        means |= {"nfe": spent, "grad_norm": grad_norm}
    for name in {"loss", "grad_norm"} & set(means):  # all read above in one go, the only synchronization with a GPU
        if not math.isfinite(means[name]):
            raise UserError(
                f"train.learning_rate: {config.learning_rate}: the {name.replace('grad_norm', 'gradient norm')} is "
                f"{means[name]} at step {step}; expected a finite number. Copy groups/ and rewards/ to another --out "
                "and try a smaller rate there"
            )
    if ranked:
        learner.optimizer.step()
        learner.optimizer.zero_grad()
    decay = ema_decay(step, warmup=config.ema_warmup, decay=config.ema_decay)
    ema_update(learner.policies.adapters["ema"], parameters, decay)
    return {"groups": ranked, **means}


def nfe(learner: Learner, draws: Sequence[GroupDraw]) -> int:
    """What a step of these draws costs (`FlowModel.nfe`), counted as if by one process in one pass.

    The budget a run has spent, and thus where it ends, must not depend on how memory divides a step (second passes and
    recomputed activations are not counted), on the number of processes, or on what a killed one computed.
    """
    policies = learner.policies
    calls: int = step_of(learner.objective).calls(learner, draws)
    return calls * policies.model.passes(policies.conditioning["guidance_scale"])


def backward(learner: Learner, draws: Sequence[GroupDraw], ranked: int) -> dict[str, Tensor]:
    """Add the gradient of the sum of loss / ranked over `draws` (of one size); return the same sums of the metrics.

    A draw whose k rewards are all equal has zero weight: it has no ranking and no best image.
    """
    found: dict[str, Tensor] = step_of(learner.objective).backward(learner.at(draws[0].group), draws, ranked)
    return found


def _groups_at_once(learner: Learner, draws: Sequence[GroupDraw]) -> int:
    """The micro-batch's; one if processes that must compute together may each have images of another size."""
    sizes = {learner.data.groups.image_size(draw.group) for draw in draws}
    sharded = distributed.is_sharded(learner.policies.model.transformer)
    return 1 if len(sizes) > 1 and sharded else learner.micro_batch.groups


def check_reference(learner: Learner, step: int, figures: Mapping[str, float]) -> None:
    """Raise RuntimeError unless the update of `step` made the policy differ from the base and left the base unchanged.

    `step` must have had a draw with a ranking, or there was no update. A wrongly compiled or patched model can return
    adapted outputs while its adapter is disabled. At step 1 the ranking loss must have been that of policy = reference.
    """
    expected = learner.objective.start_loss(learner.config.k)
    if step == 1 and expected is not None and abs(figures["loss_rank"] - expected) > 1e-3:
        raise RuntimeError(
            f"the loss at step 1 is {figures['loss_rank']}, not {expected}: policy and reference differ at the start"
        )
    # the step's own shape: another would be recompiled and prove nothing about it
    data, model = learner.data, learner.policies.model
    draws = next(of_one_size(data.draws.at(step), data.groups, learner.micro_batch.groups))
    learner = learner.at(draws[0].group)
    own = {name: value.detach() for name, value in learner.policies.parameters.items()}
    largest = max(float(value.abs().max()) for name, value in own.items() if "lora_B" in name)
    scale = max(2.0, VISIBLE / largest) if largest else 2.0  # so a small learning rate's update shows in bfloat16 too
    with torch.no_grad():
        batch = data.batches.of(draws)
        before = noised(learner, batch, base=True, reference=None)
        with carrying(model, {name: value * (scale if "lora_B" in name else 1) for name, value in own.items()}):
            after = noised(learner, batch, base=True, reference=None)
    gap = (after.d - after.d_base).abs().max()
    if gap == 0:
        raise RuntimeError("after an update the policy equals the reference: the adapter has no effect")
    if (after.d_base - before.d_base).abs().max() > 0.1 * gap:
        raise RuntimeError("the reference moves with the adapter: disabling the adapter has no effect")
