"""DiffusionNFT (2509.16117): better images pull the policy, worse ones pull its mirror image."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gdro.objectives.base import ForwardObjective, Loss, Noised, Use, given
from gdro.objectives.flow import velocity_error
from gdro.objectives.hyperparameters import Advantage, AdvantageExponent, KlWeight, Mix, Reference


@dataclass(frozen=True)
class Nft(ForwardObjective):
    """The paper's loss; the authors' code multiplies the main term by 5 / b, which weakens the KL by the same factor.

    Defaults: the authors' for GenEval, where the decay of the sampling weights (here `train.ema_decay`, `ema_warmup`)
    grows by 0.001 per step up to 0.5. For OCR they use mix 0.1 and a decay of 0 for 75 steps, growing by 0.0075 per
    step up to 0.999. They draw noise per image (`train.noise_scope: image`; the default here is per group) and train on
    the sampler's own noise levels. `kl_weight` 0 skips evaluating the base.
    """

    mix: Mix = 1.0
    kl_weight: KlWeight = 1e-4
    advantage: Advantage = "batch"
    advantage_exponent: AdvantageExponent = 0.0
    reference: Reference = "ema"
    name: ClassVar[str] = "nft"
    uses_reference: ClassVar[Use] = "velocity"

    @property
    def uses_base(self) -> bool:
        return self.kl_weight > 0 and self.reference != "base"

    def loss(self, batch: Noised) -> Loss:
        r = optimality(batch.advantages.to(batch.v))
        main = nft_loss(batch.policy, given(batch.reference), batch.v, batch.t.to(batch.v), r, self.mix).mean(-1)
        figures = {"loss_rank": main.detach()}
        if self.kl_weight == 0:
            return main, figures
        base = given(batch.base if self.uses_base else batch.reference)
        kl = velocity_error(base, batch.policy).mean(-1)
        return main + self.kl_weight * kl, figures | {"kl": kl.detach()}


def optimality(a: Tensor) -> Tensor:
    """r = clip(A / 5, -1, 1) / 2 + 1/2, the probability in [0, 1] that the image is good; any shape."""
    return (a / 5).clamp(-1, 1) / 2 + 0.5


def nft_loss(v_theta: Tensor, v_old: Tensor, v: Tensor, t: Tensor, r: Tensor, mix: float) -> Tensor:
    """r |x0+ - x0|^2 / mean|x0+ - x0| + (1 - r) |x0- - x0|^2 / mean|x0- - x0|; |.|^2 is a mean, divisors are detached.

    x0+- = x_t - t v+-, v+ = (1 - b) v_old + b v_theta, v- = (1 + b) v_old - b v_theta, b = `mix`.
    Velocities (..., tokens, channels), t and r (...) -> (...). x0 = x_t - t v, so x_t cancels.
    """
    v_theta, v_old = v_theta.to(v.dtype), v_old.to(v.dtype)
    positive = (1 - mix) * v_old + mix * v_theta
    negative = (1 + mix) * v_old - mix * v_theta
    return r * _normalized_error(positive, v, t) + (1 - r) * _normalized_error(negative, v, t)


def _normalized_error(v_hat: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """mean (x0_hat - x0)^2 / max(mean |x0_hat - x0|, 1e-5), the floor as in the authors' code."""
    error = t[..., None, None] * (v_hat - v)
    return error.square().mean((-2, -1)) / error.detach().abs().mean((-2, -1)).clamp_min(1e-5)
