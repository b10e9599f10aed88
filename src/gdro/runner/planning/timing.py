"""Times a model's passes on the device at hand, with random weights: time does not depend on their values."""

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from gdro.runner.config import RunConfig
from gdro.runner.planning.plan import Pace
from gdro.runner.planning.shapes import largest_size, outline

SMALL = 2e8  # parameters; smaller models take only seconds for a few passes on a CPU
SECONDS = 0.5  # a pass is timed as often as fits in this, at least once


def measured_pace(config: RunConfig, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Pace:
    """A pace that times each pass, by `clock`, on first use."""
    model, networks, text_shapes = outline(config)
    for part in ("transformer", "vae"):
        _fill(networks[part], device)
    model.device = device
    size = largest_size(config)
    shape = model.latent_shape(*size)

    def run(kind: str, images: int) -> None:
        x, t = torch.randn(images, *shape, device=device), torch.rand(images, device=device)
        text = {name: _text(name, (images, *one), device, model.dtype) for name, one in text_shapes.items()}
        velocity = partial(
            model.velocity, x, t, text, guidance_scale=config.sample.guidance_scale, height=size[0], width=size[1]
        )
        if kind == "learning":
            velocity().square().mean().backward()
            return
        with torch.no_grad():
            if kind == "decode":
                model.decode(x, *size)
            elif kind == "base":
                with model.adapter_disabled():
                    velocity()

    @cache
    def pace(kind: str, images: int) -> float:
        run(kind, images)
        times: list[float] = []
        while not times or sum(times) < SECONDS:
            begun = clock()
            run(kind, images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(clock() - begun)
        return min(times)

    return pace


def _fill(network: nn.Module, device: torch.device) -> None:
    """Give a network without weights random ones on `device`."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                filled = torch.empty(weight.shape, dtype=weight.dtype, device=device).normal_(std=0.02)
                module._parameters[name] = nn.Parameter(filled, requires_grad=weight.requires_grad)
        for tensors in (module._buffers, vars(module)):
            for name, table in tensors.items():
                if isinstance(table, Tensor):
                    tensors[name] = torch.ones(table.shape, dtype=table.dtype, device=device)


def _text(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Any:
    if name.endswith("mask"):
        return torch.ones(shape, dtype=torch.bool, device=device)
    return torch.randn(shape, device=device, dtype=dtype)
