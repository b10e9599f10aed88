"""Rectified flow: the path from image to noise, its velocity, and the distribution of training times."""

from typing import Literal

import torch
from torch import Tensor

TimestepDistribution = Literal["logit_normal", "uniform"]


def interpolate(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t eps: the image at t = 0, noise at t = 1; broadcastable shapes."""
    return (1 - t) * x0 + t * eps


def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
    """v = dx_t/dt = eps - x0, the model's target; broadcastable shapes."""
    return eps - x0


def velocity_error(v: Tensor, v_pred: Tensor) -> Tensor:
    """d = mean over latent elements of (v - v_pred)^2; both (..., tokens, channels) -> (...), in v's precision.

    The paper writes the squared norm; using the mean only rescales beta and gamma by a constant.
    """
    return (v - v_pred.to(v.dtype)).square().mean((-2, -1))


def implicit_reward(d: Tensor, d_ref: Tensor, beta: float) -> Tensor:
    """s = -beta (d - d_ref): the log-likelihood ratio of policy and reference, up to a constant; any shape."""
    return -beta * (d - d_ref)


def sample_timesteps(
    count: int, generator: torch.Generator, *, distribution: TimestepDistribution, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """t (count,) in (0, 1), float32: sigmoid(N(mean, std^2)) for "logit_normal" (SD3, 2403.03206), or U(0, 1)."""
    if distribution == "logit_normal":
        return (mean + std * torch.randn(count, generator=generator)).sigmoid()
    return torch.rand(count, generator=generator)
