"""DanceGRPO (2505.07818): the clipped surrogate on each stochastic step, without a divergence from the base.

The rest of the method is in how images are sampled and steps drawn: sampler "dance_grpo", `sample.shared_noise`,
`train.timestep_fraction` 0.6.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from gdro.objectives.base import Advantage, Loss, Transition, policy_loss


@dataclass(frozen=True)
class DanceGrpo:
    """mean max(-A rho, -A clip(rho, 1 +- c)). Defaults: the authors', but for the deviation: theirs is the
    sample's (n - 1), ours the population's, so that our advantages are larger by sqrt(n / (n - 1))."""

    clip_range: float = 1e-4
    advantage: Advantage = "group"
    advantage_exponent: float = 0.0
    name: ClassVar[str] = "dance_grpo"
    kind: ClassVar[Literal["trajectory"]] = "trajectory"
    uses_base: ClassVar[bool] = False
    uses_old_mean: ClassVar[bool] = False

    def loss(self, seen: Transition) -> Loss:
        return policy_loss(seen, self.clip_range)
