"""DDPO (2305.13301) in its importance-sampled form: PPO on the denoising chain, each step an action."""

from dataclasses import dataclass
from typing import ClassVar

from gdro.objectives.base import Loss, TrajectoryObjective, Transition, policy_loss
from gdro.objectives.hyperparameters import Advantage, AdvantageExponent, ClipRange


@dataclass(frozen=True)
class Ddpo(TrajectoryObjective):
    """mean max(-A rho, -A clip(rho, 1 +- c)), A from per-prompt statistics. Defaults: the authors'.

    DanceGRPO has the same loss; DDPO samples each image from its own noise and trains on every step.
    """

    clip_range: ClipRange = 1e-4
    advantage: Advantage = "group"
    advantage_exponent: AdvantageExponent = 0.0
    name: ClassVar[str] = "ddpo"

    def loss(self, batch: Transition) -> Loss:
        return policy_loss(batch, self.clip_range)
