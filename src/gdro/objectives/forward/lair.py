"""Diffusion LAIR (2605.26491): a linear reward of s and a quadratic bound, over whole groups."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from gdro.objectives.base import Loss, Noised, Reference, Use, implicit_reward


@dataclass(frozen=True)
class Lair:
    """beta and tau as GDRO's, a regularizer that lets the best image reach s = k - 1: no published ones apply here."""

    beta: float = 12.0
    tau: float = 0.05
    regularizer: float = 0.5
    reference: Reference = "base"
    name: ClassVar[str] = "lair"
    kind: ClassVar[Literal["forward"]] = "forward"
    uses_reference: ClassVar[Use] = "error"
    uses_base: ClassVar[bool] = False
    fixed_k: ClassVar[int | None] = None

    def loss(self, seen: Noised) -> Loss:
        s = implicit_reward(seen.d, seen.d_ref, self.beta)
        loss = lair_loss(s, lair_weights(seen.rewards, self.tau).to(s), self.regularizer)
        return loss, {"loss_rank": loss.detach(), "spread_s": s.detach().std(-1, correction=0)}

    def start_loss(self, k: int) -> float | None:
        return 0.0


def lair_weights(r: Tensor, tau: float) -> Tensor:
    """w = softmax(r / tau) - 1/k, summing to 0; r (..., k) -> (..., k)."""
    return (r / tau).softmax(-1) - 1 / r.shape[-1]


def lair_loss(s: Tensor, w: Tensor, regularizer: float) -> Tensor:
    """-sum_j w_j s_j + lam/k sum_j s_j^2; s, w (..., k) -> (...). Its optimum is s_j = k w_j / (2 lam)."""
    return -(w * s).sum(-1) + regularizer * s.square().mean(-1)
