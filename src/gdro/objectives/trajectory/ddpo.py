"""DDPO (2305.13301), its importance-sampled form: PPO on the denoising chain, each step an action."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from gdro.objectives.base import Advantage, Loss, Transition, policy_loss


@dataclass(frozen=True)
class Ddpo:
    """mean max(-A rho, -A clip(rho, 1 +- c)), A from the statistics of the prompt. Defaults: the authors'.

    Where DanceGRPO came to the same loss, DDPO samples with fresh noise and trains on every step.
    """

    clip_range: float = 1e-4
    advantage: Advantage = "group"
    advantage_exponent: float = 0.0
    name: ClassVar[str] = "ddpo"
    kind: ClassVar[Literal["trajectory"]] = "trajectory"
    uses_base: ClassVar[bool] = False
    uses_old_mean: ClassVar[bool] = False

    def loss(self, seen: Transition) -> Loss:
        return policy_loss(seen, self.clip_range)
