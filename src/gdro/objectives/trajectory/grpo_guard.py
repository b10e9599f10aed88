"""GRPO-Guard (2510.22319): Flow-GRPO with ratios centered on 1 and gradients of equal size at every step."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gdro.objectives.base import Loss, TrajectoryObjective, Transition, clipped_surrogate, given
from gdro.objectives.hyperparameters import Advantage, AdvantageExponent, ClipRange, KlWeight
from gdro.objectives.trajectory.flow_grpo import step_kl


@dataclass(frozen=True)
class GrpoGuard(TrajectoryObjective):
    """Defaults: the authors': a clip range that is small because the log-ratio is scaled by the step's std, no
    divergence, otherwise Flow-GRPO's. Published for the sampler flow_grpo; any other uses the same density formula."""

    clip_range: ClipRange = 2e-6
    kl_weight: KlWeight = 0.0
    advantage: Advantage = "batch"
    advantage_exponent: AdvantageExponent = 0.0
    name: ClassVar[str] = "grpo_guard"
    uses_old_mean: ClassVar[bool] = True

    @property
    def uses_base(self) -> bool:
        return self.kl_weight > 0

    def loss(self, batch: Transition) -> Loss:
        log_ratio = guarded_log_ratio(batch.log_prob, batch.old_log_prob, batch.mean, given(batch.old_mean), batch.std)
        advantage = batch.advantage.to(log_ratio)
        loss, ratio, clipped = grpo_guard_loss(advantage, log_ratio, batch.dt, self.clip_range)
        figures = {"loss_policy": loss.detach(), "ratio": ratio, "clipped": clipped}
        if self.kl_weight == 0:
            return loss, figures
        kl = step_kl(batch.mean, given(batch.base_mean), batch.std) * batch.kl_scale
        return loss + self.kl_weight * kl, figures | {"kl": kl.detach()}


def grpo_guard_loss(
    advantage: Tensor, log_ratio: Tensor, dt: float | Tensor, clip_range: float
) -> tuple[Tensor, Tensor, Tensor]:
    """max(-A rho, -A clip(rho, 1 +- c)) / |dt|, rho = e^log_ratio; (n,) -> (loss, rho, clipped) (n,).

    A step moves the mean in proportion to dt; the division gives all steps equal weight.
    """
    loss, ratio, clipped = clipped_surrogate(advantage, log_ratio, clip_range)
    return loss / -dt, ratio, clipped


def guarded_log_ratio(log_prob: Tensor, old_log_prob: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """std [log p - log p_old + mean (mean - old_mean)^2 / (2 std^2)] (eq. 8), std including sqrt(-dt) -> (n,).

    For x' = old_mean + std eps it is the mean of eps (mean - old_mean): zero on average, whereas the plain log-ratio is
    negative, and on the same scale at every noise level.
    """
    return (log_prob - old_log_prob + step_kl(mean, old_mean, std)) * std.reshape(-1)
