"""DanceGRPO (2505.07818): the clipped surrogate on each stochastic step, without a divergence from the base.

The rest of the method is in how images are sampled and steps chosen: sampler "dance_grpo", `sample.shared_noise`,
`train.timestep_fraction` 0.6.
"""

from dataclasses import dataclass
from typing import ClassVar

from gdro.objectives.base import Loss, TrajectoryObjective, Transition, policy_loss
from gdro.objectives.hyperparameters import Advantage, AdvantageExponent, ClipRange


@dataclass(frozen=True)
class DanceGrpo(TrajectoryObjective):
    """mean max(-A rho, -A clip(rho, 1 +- c)). Defaults: the authors', except that their standard deviation is the
    sample's (n - 1) and ours the population's, so our advantages are larger by sqrt(n / (n - 1))."""

    clip_range: ClipRange = 1e-4
    advantage: Advantage = "group"
    advantage_exponent: AdvantageExponent = 0.0
    name: ClassVar[str] = "dance_grpo"

    def loss(self, batch: Transition) -> Loss:
        return policy_loss(batch, self.clip_range)
