"""The ODE loop is FluxPipeline's with Euler, and every solver tends to the same solution."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from gdro.common.errors import UserError
from gdro.models.flux import FluxModel
from gdro.models.lora import write_lora
from gdro.models.schedulers import SchedulerName, flow_scheduler, resolution_shift
from gdro.samplers.ode import generate

HOW = {"guidance_scale": 3.5, "height": 32, "width": 64}
PROMPTS = ["a red wall", "two dots"]


def noise(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 32, 64, generator=torch.Generator().manual_seed(0))


def solve(model: FluxModel, name: str, steps: int) -> torch.Tensor:
    scheduler = model.scheduler(name, steps, 32, 64)
    return generate(model, noise(), model.encode_text(PROMPTS, 24), scheduler, **HOW)


def pipeline_images(pipe: FluxPipeline, steps: int = 5) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        PROMPTS,
        latents=noise(),
        num_inference_steps=steps,
        guidance_scale=3.5,
        height=32,
        width=64,
        max_sequence_length=24,
    ).images
    return np.stack([np.asarray(image, np.int16) for image in images])


@pytest.mark.parametrize("tuned", [False, True])
def test_euler_gives_the_pipelines_own_images(flux_folder: Path, flux: FluxModel, tmp_path: Path, tuned: bool):
    """Also with the adapter, as `pipe.load_lora_weights(folder)` reads it."""
    pipe = FluxPipeline.from_pretrained(flux_folder)
    base = pipeline_images(pipe)
    if tuned:
        flux.add_adapter(rank=4, alpha=10, targets="attention+ff", seed=0)
        for parameter in flux.adapter().values():
            parameter.data.add_(0.1)
        write_lora(tmp_path, flux.adapter(), {"r": 4, "lora_alpha": 10}, {})
        pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    latents = solve(flux, "FlowMatchEulerDiscreteScheduler", 5)
    images = np.stack([np.asarray(image, np.int16) for image in flux.decode(latents, 32, 64)])
    expected = pipeline_images(pipe)
    assert np.abs(images - expected).max() <= 1
    assert (np.abs(expected - base).max() > 1) == tuned


@pytest.mark.slow
@pytest.mark.parametrize("name", get_args(SchedulerName))
def test_every_solver_tends_to_the_same_solution(flux: FluxModel, name: str):
    """With more steps each comes nearer to Euler's solution with 400, and repeats itself exactly."""
    solution = solve(flux, "FlowMatchEulerDiscreteScheduler", 400)
    errors = [(solve(flux, name, steps) - solution).abs().max().item() for steps in (4, 40)]
    assert errors[1] < 0.1
    assert errors[1] < 0.5 * errors[0]
    assert torch.equal(solve(flux, name, 4), solve(flux, name, 4))


def test_schedule_is_shifted_by_the_number_of_tokens(flux: FluxModel):
    """mu is linear in tokens: .5 at 256, 1.15 at 4096; sigma = e^mu / (e^mu + 1/s - 1) at s = 1, 1 - 1/n, ..., 1/n."""
    config = dict(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config)
    assert resolution_shift(config, 256) == pytest.approx(0.5)
    assert resolution_shift(config, 4096) == pytest.approx(1.15)
    how = {"sigmas": [1, 0.75, 0.5, 0.25], "mu": resolution_shift(config, 4096), "device": torch.device("cpu")}
    scheduler = flow_scheduler("FlowMatchEulerDiscreteScheduler", config, 4, **how)
    shift = float(np.exp(1.15))
    expected = [shift / (shift + 1 / s - 1) for s in (1, 0.75, 0.5, 0.25)] + [0]
    assert scheduler.sigmas.tolist() == pytest.approx(expected, abs=1e-6)
    multistep = flow_scheduler("UniPCMultistepScheduler", config, 4, **how)
    assert multistep.config.flow_shift == pytest.approx(shift)


def test_unknown_and_stochastic_schedulers_are_refused(flux: FluxModel):
    with pytest.raises(UserError, match='did you mean "FlowMatchEulerDiscreteScheduler"'):
        flux.scheduler("FlowMatchEulerScheduler", 4, 32, 64)
    with pytest.raises(UserError, match="not a deterministic flow scheduler"):
        flux.scheduler("FlowMatchLCMScheduler", 4, 32, 64)
