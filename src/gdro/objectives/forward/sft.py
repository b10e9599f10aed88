"""Supervised fine-tuning on the best image of each group, the other images unseen by the loss."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from gdro.objectives.base import Loss, Noised, Use


@dataclass(frozen=True)
class Sft:
    """L = d_top-1: GDRO's regularizer alone. Rejection-sampling fine-tuning, best of k (2304.06767)."""

    name: ClassVar[str] = "sft"
    kind: ClassVar[Literal["forward"]] = "forward"
    uses_reference: ClassVar[Use] = None
    uses_base: ClassVar[bool] = False
    fixed_k: ClassVar[int | None] = None

    def loss(self, seen: Noised) -> Loss:
        loss = seen.d[:, 0]
        return loss, {"loss_rank": loss.detach(), "loss_top1": loss.detach()}

    def start_loss(self, k: int) -> float | None:
        return None
