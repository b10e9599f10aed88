"""What an objective declares, receives and returns.

An objective is a frozen dataclass that extends `ForwardObjective` or `TrajectoryObjective`. Its fields are its
hyperparameters with their published defaults, the pure functions beside it hold its formula, and its `loss` connects
the two. Shapes: g groups, k images per group, n images.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gdro.objectives.flow import velocity_error

Need = Literal["rewards", "trajectories"]  # the parts of a group an objective learns from
Use = Literal["error", "velocity"] | None  # what an objective needs of its reference: only the scalars d_ref, or v_ref

Loss = tuple[Tensor, dict[str, Tensor]]  # per group or image, with gradient; detached metrics of the same shape


@dataclass(frozen=True, eq=False)
class Noised:
    """g groups of k noised images, best first, and the velocities predicted for them."""

    rewards: Tensor  # (g, k) float64, descending
    advantages: Tensor  # (g, k); zeros for an objective without the field `advantage`
    t: Tensor  # (g, k) in (0, 1)
    x_t: Tensor  # (g, k, tokens, channels): image and noise, mixed by `interpolate`
    v: Tensor  # (g, k, tokens, channels): the `velocity_target` of the two
    policy: Tensor  # (g, k, tokens, channels): v_theta, with gradient
    reference: Tensor | None = None  # (g, k, tokens, channels): velocity of the objective's `reference`
    base: Tensor | None = None  # (g, k, tokens, channels): velocity of the frozen base, only if `uses_base`
    reference_error: Tensor | None = None  # (g, k): d_ref instead of `reference`, if it was computed earlier

    @cached_property
    def d(self) -> Tensor:
        """Velocity errors (g, k) of the policy, with gradient."""
        return velocity_error(self.v, self.policy)

    @cached_property
    def d_ref(self) -> Tensor:
        """Velocity errors (g, k) of the reference."""
        if self.reference_error is not None:
            return self.reference_error
        return velocity_error(self.v, given(self.reference))

    @cached_property
    def d_base(self) -> Tensor:
        """Velocity errors (g, k) of the frozen base."""
        return velocity_error(self.v, given(self.base))


@dataclass(frozen=True, eq=False)
class Transition:
    """One stochastic sampling step x' = mean + std eps of n images, re-evaluated under the current policy."""

    log_prob: Tensor  # (n,) of x' under the policy, mean over elements, with gradient
    old_log_prob: Tensor  # (n,) the same under the sampling policy
    advantage: Tensor  # (n,)
    mean: Tensor  # (n, tokens, channels) of the policy, with gradient
    std: Tensor  # of the step's Gaussian: the sampler's noise level times sqrt(-dt); broadcasts to mean
    dt: float | Tensor  # t_next - t < 0; a number or (n,)
    ratio_scale: float | Tensor  # factors on a log-ratio and on a divergence from the base, as the sampler's authors
    kl_scale: float | Tensor  # weight them (samplers/sde.py); numbers or (n,)
    base_mean: Tensor | None = None  # (n, tokens, channels) of the frozen base, only if `uses_base`
    old_mean: Tensor | None = None  # (n, tokens, channels) of the sampling policy, only if `uses_old_mean`


@dataclass(frozen=True)
class ForwardObjective(ABC):
    """Learns from clean images, noised anew at each visit, and their rewards.

    Subclasses with a reference (`uses_reference`) have the field `reference`; those that use advantages have
    `advantage` and optionally `advantage_exponent`.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})
    uses_reference: ClassVar[Use] = None
    fixed_k: ClassVar[int | None] = None

    @property
    def uses_base(self) -> bool:
        """Whether the loss needs `Noised.base`."""
        return False

    @abstractmethod
    def loss(self, batch: Noised) -> Loss:
        """Loss (g,) and metrics (g,); "loss_rank" is the main term."""
        ...

    def start_loss(self, k: int) -> float | None:
        """The main term when policy = reference; None if it depends on rewards or images."""
        return None


@dataclass(frozen=True)
class TrajectoryObjective(ABC):
    """Learns from the stochastic steps that sampled the images."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset({"rewards", "trajectories"})
    uses_old_mean: ClassVar[bool] = False

    @property
    def uses_base(self) -> bool:
        """Whether the loss needs `Transition.base_mean`."""
        return False

    @abstractmethod
    def loss(self, batch: Transition) -> Loss:
        """Loss (n,) and metrics (n,); "loss_policy" is the main term."""
        ...

    def start_loss(self, k: int) -> float | None:
        """None: it always depends on the rewards."""
        return None


Objective = ForwardObjective | TrajectoryObjective


def clipped_surrogate(advantage: Tensor, log_ratio: Tensor, clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
    """PPO: max(-A rho, -A clip(rho, 1 - c, 1 + c)), rho = e^log_ratio; any shape -> (loss, rho, clipped 0/1).

    An image counts as clipped if clipping zeroes its gradient (2505.05470, eq. 5; 1707.06347).
    """
    ratio = log_ratio.exp()
    free = -advantage * ratio
    bound = -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(free, bound), ratio.detach(), (bound > free).to(ratio.dtype)


def policy_loss(batch: Transition, clip_range: float) -> Loss:
    """`clipped_surrogate` of a step's images (n,) and its metrics: loss_policy, ratio, clipped."""
    log_ratio = (batch.log_prob - batch.old_log_prob) * batch.ratio_scale
    loss, ratio, clipped = clipped_surrogate(batch.advantage.to(log_ratio), log_ratio, clip_range)
    return loss, {"loss_policy": loss.detach(), "ratio": ratio, "clipped": clipped}


def given(tensor: Tensor | None) -> Tensor:
    """A tensor that the objective declared it uses; ValueError if the caller left it out."""
    if tensor is None:
        raise ValueError("the objective uses a reference or base that was not given")
    return tensor
