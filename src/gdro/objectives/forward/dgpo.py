"""DGPO (2510.08425): a group's advantage-weighted errors, scaled by how far the group still is from its preference."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gdro.objectives.base import Advantage, Loss, Noised, Reference, Use


@dataclass(frozen=True)
class Dgpo:
    """Defaults: the authors' for OCR with a frozen reference (beta 10 to 100); with reference "ema" they take 2000 to
    5000, for GenEval advantage "group". Without their clipping of the errors and their choice of noise levels."""

    beta: float = 100.0
    advantage: Advantage = "batch"
    advantage_exponent: float = 0.0
    reference: Reference = "base"
    name: ClassVar[str] = "dgpo"
    kind: ClassVar[Literal["forward"]] = "forward"
    uses_reference: ClassVar[Use] = "error"
    uses_base: ClassVar[bool] = False
    fixed_k: ClassVar[int | None] = None

    def loss(self, seen: Noised) -> Loss:
        a = seen.advantages.to(seen.d)
        weight = dgpo_weight(seen.d, seen.d_ref, a, self.beta)
        loss = weight * (a * seen.d).mean(-1)
        return loss, {"loss_rank": loss.detach(), "weight": weight}

    def start_loss(self, k: int) -> float | None:
        return None


def dgpo_weight(d: Tensor, d_ref: Tensor, a: Tensor, beta: float) -> Tensor:
    """Detached w = sigmoid(beta/k sum_i A_i (d_i - d_ref_i)), 1/2 at the reference; d, d_ref, a (..., k) -> (...).

    The loss w mean(A d) has thus the gradient of log(1 + e^x) / beta with x = beta mean(A (d - d_ref)).
    """
    return torch.sigmoid(beta * (a * (d.detach() - d_ref)).mean(-1))
