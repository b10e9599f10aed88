"""The probability-flow ODE dx/dt = v_theta(x, t, c), from noise at t = 1 to latents at t = 0."""

from typing import Any

import torch
from torch import Tensor

from gdro.models.base import FlowModel, Text
from gdro.models.finite import Watch


@torch.no_grad()
def generate(
    model: FlowModel,
    noise: Tensor,
    text: Text,
    scheduler: Any,
    *,
    guidance_scale: float,
    height: int,
    width: int,
) -> Tensor:
    """Integrate `noise` (n, tokens, channels) with `scheduler`'s own steps; latents of the same shape, float32.

    `scheduler` must come fresh from `model.scheduler(...)`: it holds the state of one integration. A second-order
    solver lists its inner points as extra timesteps, so every solver needs one evaluation per timestep. Raises
    NotFinite if a velocity or the result holds NaN or infinity.
    """
    horizon = scheduler.config.num_train_timesteps
    x, watch = noise.to(model.device, torch.float32), Watch()
    for timestep in scheduler.timesteps:
        t = (timestep / horizon).expand(len(x))
        velocity = model.velocity(x, t, text, guidance_scale=guidance_scale, height=height, width=width)
        watch.see(velocity)
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    watch.check(x)
    return x
