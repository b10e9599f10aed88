"""Reward-weighted regression: imitate a group's images in proportion to e^{r / tau} (Lee et al., 2302.12192)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from gdro.objectives.base import Loss, Noised, Use


@dataclass(frozen=True)
class Rwr:
    """Default tau: GDRO's; as tau falls to 0 this becomes `sft`.

    Weights are a softmax inside the group, as in the paper's exponential; Flow-GRPO's code of this name takes the
    rewards themselves.
    """

    tau: float = 0.05
    name: ClassVar[str] = "rwr"
    kind: ClassVar[Literal["forward"]] = "forward"
    uses_reference: ClassVar[Use] = None
    uses_base: ClassVar[bool] = False
    fixed_k: ClassVar[int | None] = None

    def loss(self, seen: Noised) -> Loss:
        loss = rwr_loss(seen.d, seen.rewards, self.tau)
        return loss, {"loss_rank": loss.detach(), "loss_top1": seen.d[:, 0].detach()}

    def start_loss(self, k: int) -> float | None:
        return None


def rwr_loss(d: Tensor, r: Tensor, tau: float) -> Tensor:
    """sum_i softmax(r / tau)_i d_i; d, r (..., k) -> (...)."""
    return ((r / tau).softmax(-1).to(d) * d).sum(-1)
