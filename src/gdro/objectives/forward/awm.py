"""Advantage weighted matching (2509.25050): a policy gradient whose log-likelihood is the flow-matching loss."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gdro.objectives.base import ForwardObjective, Loss, Noised, Use, clipped_surrogate
from gdro.objectives.hyperparameters import Advantage, AdvantageExponent, ClipRange, Reference


@dataclass(frozen=True)
class Awm(ForwardObjective):
    """The loss is `awm_loss`.

    The authors' code differs: it divides the advantages, at most 5, by 5; replaces d by 4 t d^(1/4) (their paper uses
    d, as here); adds divergences from the base and the average; draws noise per image (`train.noise_scope: image`) and
    t from the sampler's own levels. Their clip_range of 1 rarely binds.
    """

    clip_range: ClipRange = 1.0
    advantage: Advantage = "batch"
    advantage_exponent: AdvantageExponent = 0.0
    reference: Reference = "old"
    name: ClassVar[str] = "awm"
    uses_reference: ClassVar[Use] = "error"

    def loss(self, batch: Noised) -> Loss:
        loss, ratio, clipped = awm_loss(batch.d, batch.d_ref, batch.advantages.to(batch.d), self.clip_range)
        return loss, {"loss_rank": loss.detach(), "ratio": ratio, "clipped": clipped}


def awm_loss(d: Tensor, d_old: Tensor, a: Tensor, clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
    """mean max(-A rho, -A clip(rho, 1 +- c)), rho = exp(d_old - d); d, d_old, a (..., k) -> (loss, rho, clipped) (...).

    At d = d_old its gradient is mean A grad d.
    """
    loss, ratio, clipped = clipped_surrogate(a, d_old - d, clip_range)
    return loss.mean(-1), ratio.mean(-1), clipped.mean(-1)
