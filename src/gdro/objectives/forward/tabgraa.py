"""TabGRAA (2604.18966), adapted from tabular language models: a group's high half against its low half."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gdro.objectives.base import ForwardObjective, Loss, Noised, Use
from gdro.objectives.flow import implicit_reward
from gdro.objectives.hyperparameters import Beta, LowWeight, Reference


@dataclass(frozen=True)
class Tabgraa(ForwardObjective):
    """Defaults: GDRO's beta and equal weights for both halves; the published values are for likelihoods of text."""

    beta: Beta = 12.0
    low_weight: LowWeight = 1.0
    reference: Reference = "base"
    name: ClassVar[str] = "tabgraa"
    uses_reference: ClassVar[Use] = "error"

    def loss(self, batch: Noised) -> Loss:
        s = implicit_reward(batch.d, batch.d_ref, self.beta)
        loss = tabgraa_loss(s, self.low_weight)
        return loss, {"loss_rank": loss.detach(), "spread_s": s.detach().std(-1, correction=0)}

    def start_loss(self, k: int) -> float | None:
        return 0.5


def tabgraa_loss(s: Tensor, low_weight: float) -> Tensor:
    """1 - sigmoid(mean_high s - beta' mean_low s); s (..., k), best first -> (...).

    The halves are the best and the worst floor(k / 2) images; if k is odd, the middle image belongs to neither.
    """
    half = s.shape[-1] // 2
    return torch.sigmoid(low_weight * s[..., -half:].mean(-1) - s[..., :half].mean(-1))
