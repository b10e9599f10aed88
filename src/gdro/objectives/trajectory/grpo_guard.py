"""GRPO-Guard (2510.22319): Flow-GRPO with ratios centered on 1 and gradients of one size at every step."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from gdro.objectives.base import Advantage, Loss, Transition, clipped_surrogate, given
from gdro.objectives.trajectory.flow_grpo import step_kl


@dataclass(frozen=True)
class GrpoGuard:
    """Defaults: the authors': a clip range that is small because the log-ratio is scaled by the step's std, no
    divergence, else Flow-GRPO's. Published for the sampler flow_grpo; with any other the same formula of densities."""

    clip_range: float = 2e-6
    kl_weight: float = 0.0
    advantage: Advantage = "batch"
    advantage_exponent: float = 0.0
    name: ClassVar[str] = "grpo_guard"
    kind: ClassVar[Literal["trajectory"]] = "trajectory"
    uses_old_mean: ClassVar[bool] = True

    @property
    def uses_base(self) -> bool:
        return self.kl_weight > 0

    def loss(self, seen: Transition) -> Loss:
        log_ratio = guarded_log_ratio(seen.log_prob, seen.old_log_prob, seen.mean, given(seen.old_mean), seen.std)
        loss, ratio, clipped = clipped_surrogate(seen.advantage.to(log_ratio), log_ratio, self.clip_range)
        loss = loss / -seen.dt  # a step moves the mean in proportion to dt; this weighs all steps alike
        figures = {"loss_policy": loss.detach(), "ratio": ratio, "clipped": clipped}
        if self.kl_weight == 0:
            return loss, figures
        kl = step_kl(seen.mean, given(seen.base_mean), seen.std) * seen.kl_scale
        return loss + self.kl_weight * kl, figures | {"kl": kl.detach()}


def guarded_log_ratio(log_prob: Tensor, old_log_prob: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """std [log p - log p_old + mean (mean - old_mean)^2 / (2 std^2)] (eq. 8), std the step's whole one -> (n,).

    For x' = old_mean + std eps it is the mean of eps (mean - old_mean): zero on average, where the plain log-ratio is
    negative, and of one scale at every noise level.
    """
    return (log_prob - old_log_prob + step_kl(mean, old_mean, std)) * std.reshape(-1)
