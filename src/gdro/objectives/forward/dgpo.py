"""DGPO (2510.08425): a group's advantage-weighted errors, scaled by how far the group still is from its preference."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gdro.objectives.base import ForwardObjective, Loss, Noised, Use
from gdro.objectives.hyperparameters import Advantage, AdvantageExponent, Beta, Reference


@dataclass(frozen=True)
class Dgpo(ForwardObjective):
    """Defaults: the authors' for OCR with a frozen reference (beta 10 to 100); with reference "ema" they use 2000 to
    5000, and for GenEval advantage "group". Their clipping of errors and choice of noise levels are left out."""

    beta: Beta = 100.0
    advantage: Advantage = "batch"
    advantage_exponent: AdvantageExponent = 0.0
    reference: Reference = "base"
    name: ClassVar[str] = "dgpo"
    uses_reference: ClassVar[Use] = "error"

    def loss(self, batch: Noised) -> Loss:
        loss, weight = dgpo_loss(batch.d, batch.d_ref, batch.advantages.to(batch.d), self.beta)
        return loss, {"loss_rank": loss.detach(), "weight": weight}


def dgpo_loss(d: Tensor, d_ref: Tensor, a: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """w mean(A d), with w = `dgpo_weight`; d, d_ref, a (..., k) -> (loss, w) (...).

    Its gradient is that of log(1 + e^x) / beta with x = beta mean(A (d - d_ref)).
    """
    weight = dgpo_weight(d, d_ref, a, beta)
    return weight * (a * d).mean(-1), weight


def dgpo_weight(d: Tensor, d_ref: Tensor, a: Tensor, beta: float) -> Tensor:
    """Detached w = sigmoid(beta/k sum_i A_i (d_i - d_ref_i)), 1/2 at the reference; d, d_ref, a (..., k) -> (...)."""
    return torch.sigmoid(beta * (a * (d.detach() - d_ref)).mean(-1))
