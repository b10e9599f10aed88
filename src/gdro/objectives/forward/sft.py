"""Supervised fine-tuning on the best image of each group; the loss ignores the others."""

from dataclasses import dataclass
from typing import ClassVar

from gdro.objectives.base import ForwardObjective, Loss, Noised


@dataclass(frozen=True)
class Sft(ForwardObjective):
    """L = d_top-1: GDRO's regularizer alone. Rejection-sampling fine-tuning, best of k (2304.06767)."""

    name: ClassVar[str] = "sft"

    def loss(self, batch: Noised) -> Loss:
        loss = batch.d[:, 0]
        return loss, {"loss_rank": loss.detach(), "loss_top1": loss.detach()}
