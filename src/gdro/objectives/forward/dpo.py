"""Diffusion-DPO (2311.12908): pairs of images, the better one first."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from gdro.objectives.base import ForwardObjective, Loss, Noised, Use
from gdro.objectives.flow import implicit_reward
from gdro.objectives.hyperparameters import Beta, Reference


@dataclass(frozen=True)
class Dpo(ForwardObjective):
    """Default beta: from the rectified-flow DPO of Flow-GRPO's authors; reference "old" is their online variant."""

    beta: Beta = 100.0
    reference: Reference = "base"
    name: ClassVar[str] = "dpo"
    uses_reference: ClassVar[Use] = "error"
    fixed_k: ClassVar[int | None] = 2

    def loss(self, batch: Noised) -> Loss:
        s = implicit_reward(batch.d, batch.d_ref, self.beta)
        loss = dpo_loss(s)
        return loss, {"loss_rank": loss.detach(), "spread_s": s.detach().std(-1, correction=0)}

    def start_loss(self, k: int) -> float | None:
        return math.log(2)


def dpo_loss(s: Tensor) -> Tensor:
    """-log sigmoid((s_w - s_l) / 2) (eq. 14); s (..., 2), winner first -> (...).

    The paper's 1/2 is kept, so this equals `rank` on pairs at half its beta.
    """
    return -logsigmoid((s[..., 0] - s[..., 1]) / 2)
