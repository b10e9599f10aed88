"""Reward-weighted regression: imitate a group's images in proportion to e^{r / tau} (Lee et al., 2302.12192)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gdro.objectives.base import ForwardObjective, Loss, Noised
from gdro.objectives.hyperparameters import Tau


@dataclass(frozen=True)
class Rwr(ForwardObjective):
    """Default tau: GDRO's; as tau goes to 0 this becomes `sft`.

    Weights are a softmax within the group, matching the paper's exponential; Flow-GRPO's code of this name weights by
    the rewards themselves.
    """

    tau: Tau = 0.05
    name: ClassVar[str] = "rwr"

    def loss(self, batch: Noised) -> Loss:
        loss = rwr_loss(batch.d, batch.rewards, self.tau)
        return loss, {"loss_rank": loss.detach(), "loss_top1": batch.d[:, 0].detach()}


def rwr_loss(d: Tensor, r: Tensor, tau: float) -> Tensor:
    """sum_i softmax(r / tau)_i d_i; d, r (..., k) -> (...)."""
    return ((r / tau).softmax(-1).to(d) * d).sum(-1)
