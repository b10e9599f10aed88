"""Advantage weighted matching (2509.25050): a policy gradient whose log-likelihood is the flow-matching loss."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from gdro.objectives.base import Advantage, Loss, Noised, Reference, Use, clipped_surrogate


@dataclass(frozen=True)
class Awm:
    """mean max(-A rho, -A clip(rho)), rho = exp(d_old - d); at policy = old its gradient is mean A grad d.

    The authors' code differs: it divides the advantages, at most 5, by 5; takes 4 t d^(1/4) in place of d (their paper
    d, as here); adds divergences from base and average; draws noise for each image (`train.noise_scope: image`) and t
    from the sampler's own levels. Their clip_range 1 hardly binds.
    """

    clip_range: float = 1.0
    advantage: Advantage = "batch"
    advantage_exponent: float = 0.0
    reference: Reference = "round"
    name: ClassVar[str] = "awm"
    kind: ClassVar[Literal["forward"]] = "forward"
    uses_reference: ClassVar[Use] = "error"
    uses_base: ClassVar[bool] = False
    fixed_k: ClassVar[int | None] = None

    def loss(self, seen: Noised) -> Loss:
        loss, ratio, clipped = clipped_surrogate(seen.advantages.to(seen.d), seen.d_ref - seen.d, self.clip_range)
        loss = loss.mean(-1)
        return loss, {"loss_rank": loss.detach(), "ratio": ratio.mean(-1), "clipped": clipped.mean(-1)}

    def start_loss(self, k: int) -> float | None:
        return None
