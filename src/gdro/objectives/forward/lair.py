"""Diffusion LAIR (2605.26491): a linear reward of s and a quadratic bound, over whole groups."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gdro.objectives.base import ForwardObjective, Loss, Noised, Use
from gdro.objectives.flow import implicit_reward
from gdro.objectives.hyperparameters import Beta, Reference, Regularizer, Tau


@dataclass(frozen=True)
class Lair(ForwardObjective):
    """Defaults: GDRO's beta and tau, and a regularizer that lets the best image reach s = k - 1; no published values
    apply here."""

    beta: Beta = 12.0
    tau: Tau = 0.05
    regularizer: Regularizer = 0.5
    reference: Reference = "base"
    name: ClassVar[str] = "lair"
    uses_reference: ClassVar[Use] = "error"

    def loss(self, batch: Noised) -> Loss:
        s = implicit_reward(batch.d, batch.d_ref, self.beta)
        loss = lair_loss(s, lair_weights(batch.rewards, self.tau).to(s), self.regularizer)
        return loss, {"loss_rank": loss.detach(), "spread_s": s.detach().std(-1, correction=0)}

    def start_loss(self, k: int) -> float | None:
        return 0.0


def lair_weights(r: Tensor, tau: float) -> Tensor:
    """w = softmax(r / tau) - 1/k, summing to 0; r (..., k) -> (..., k)."""
    return (r / tau).softmax(-1) - 1 / r.shape[-1]


def lair_loss(s: Tensor, w: Tensor, regularizer: float) -> Tensor:
    """-sum_j w_j s_j + lam/k sum_j s_j^2; s, w (..., k) -> (...). Its optimum is s_j = k w_j / (2 lam)."""
    return -(w * s).sum(-1) + regularizer * s.square().mean(-1)
