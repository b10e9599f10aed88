"""diffusers' deterministic flow solvers, each set to the model's own time schedule."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from gdro.common.errors import UserError, did_you_mean

SchedulerName = Literal[
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
]


def flow_scheduler(
    name: str,
    config: Mapping[str, Any],
    num_inference_steps: int,
    *,
    sigmas: Sequence[float] | None,
    mu: float,
    device: torch.device,
) -> Any:
    """Scheduler `name` for a model whose own scheduler has `config`, with its timesteps set.

    Euler gets the family's `sigmas` (None: its own) and, if its shift is dynamic, `mu`. The others only support a
    constant shift and get the equivalent one, e^mu: e^mu / (e^mu + 1/s - 1) = shift s / (1 + (shift - 1) s).
    Raises UserError for any other scheduler.
    """
    if name not in get_args(SchedulerName):
        hint = did_you_mean(name, get_args(SchedulerName))
        raise UserError(f"sample.scheduler: {name!r} is not a deterministic flow scheduler of diffusers{hint}")
    import diffusers  # its schedulers take a second to import, too long for reading a configuration

    kind = getattr(diffusers, name)
    if name == "FlowMatchEulerDiscreteScheduler":
        scheduler = kind.from_config(config)
        given = {"num_inference_steps": num_inference_steps} if sigmas is None else {"sigmas": list(sigmas)}
        scheduler.set_timesteps(**given, mu=mu, device=device)
    else:
        shift = config.get("shift", 1.0)
        if config.get("use_dynamic_shifting"):
            shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
        if name == "FlowMatchHeunDiscreteScheduler":
            scheduler = kind(shift=shift)
        else:
            scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        scheduler.set_timesteps(num_inference_steps, device=device)
    scheduler.set_begin_index(0)
    return scheduler


def resolution_shift(config: Mapping[str, Any], tokens: int) -> float:
    """mu, linear in the number of tokens: larger images stay longer at high noise (FLUX; SD3, 2403.03206, 5.3.2)."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (top - base) * (tokens - low) / (high - low)
