"""Flow-GRPO (2505.05470): PPO's clipped surrogate on each stochastic step, plus a divergence from the base.

Flow-GRPO-Fast and MixGRPO (2507.21802) are this on a window of steps (`sample.window`), Pref-GRPO (2508.20751) this
with advantage "win_rate", and SLAS (2605.10937) this with advantage "slas".
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gdro.objectives.base import Loss, TrajectoryObjective, Transition, given, policy_loss
from gdro.objectives.hyperparameters import Advantage, AdvantageExponent, ClipRange, KlWeight


@dataclass(frozen=True)
class FlowGrpo(TrajectoryObjective):
    """Defaults: the authors' for OCR and GenEval on SD3.5 (`kl_weight` 0 skips the base).

    With a window they use other values (clip 1e-5, no divergence), and on FLUX.1 with PickScore advantage "group".
    MixGRPO's code divides by the sample deviation (n - 1); ours is the population's. See `advantages` on "batch".
    """

    clip_range: ClipRange = 1e-4
    kl_weight: KlWeight = 0.04
    advantage: Advantage = "batch"
    advantage_exponent: AdvantageExponent = 0.0
    name: ClassVar[str] = "flow_grpo"

    @property
    def uses_base(self) -> bool:
        return self.kl_weight > 0

    def loss(self, batch: Transition) -> Loss:
        loss, figures = policy_loss(batch, self.clip_range)
        if self.kl_weight == 0:
            return loss, figures
        kl = step_kl(batch.mean, given(batch.base_mean), batch.std) * batch.kl_scale
        return loss + self.kl_weight * kl, figures | {"kl": kl.detach()}


def step_kl(mean: Tensor, base_mean: Tensor, std: Tensor) -> Tensor:
    """KL of two Gaussians of equal std, averaged over elements: mean (mean - base_mean)^2 / (2 std^2).

    Means (n, tokens, channels), std broadcastable and including sqrt(-dt) -> (n,).
    """
    return ((mean - base_mean).square() / (2 * std.square())).flatten(1).mean(1)
