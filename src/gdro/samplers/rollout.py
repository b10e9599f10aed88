"""Sampling for policy gradients: the ODE with a window of stochastic steps whose states are kept."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gdro.models.base import FlowModel, Text
from gdro.models.finite import Watch
from gdro.samplers.sde import STEPS, log_prob
from gdro.samplers.trajectory import Trajectory


@torch.no_grad()
def rollout(
    model: FlowModel,
    noise: Tensor,
    text: Text,
    scheduler: Any,
    *,
    sampler: str,
    noise_level: float,
    window: range,
    step_noise: Callable[[int], Tensor],
    guidance_scale: float,
    height: int,
    width: int,
) -> tuple[Tensor, Trajectory]:
    """Integrate `noise` (n, tokens, channels) -> (latents of that shape, trajectory of the n images), float32.

    The times are the sigmas of `scheduler`, diffusers' Euler. Step i in `window` is STEPS[sampler] with the standard
    normal `step_noise(i)` (n, tokens, channels); all others are Euler steps. Raises NotFinite if a velocity or the
    result holds NaN or infinity.
    """
    step = STEPS[sampler]
    times = scheduler.sigmas.to(model.device, torch.float32)
    x, watch = noise.to(model.device, torch.float32), Watch()
    states, log_probs = [], []
    for i, (t, t_next) in enumerate(pairwise(times)):
        velocity = model.velocity(x, t.expand(len(x)), text, guidance_scale=guidance_scale, height=height, width=width)
        watch.see(velocity)
        if i in window:
            states.append(x)
            mean, std = step(x, velocity, t, t_next, noise_level)
            x = mean + std * step_noise(i).to(x)
            log_probs.append(log_prob(x, mean, std))
        else:
            x = x + velocity * (t_next - t)
        if i == window[-1]:
            states.append(x)
    watch.check(x)
    seen = times[window.start : window.stop + 1]
    return x, Trajectory(torch.stack(states, 1).cpu(), torch.stack(log_probs, 1).cpu(), seen.cpu())
