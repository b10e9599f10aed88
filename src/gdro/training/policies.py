"""The weights that a step evaluates, by name: one model and the adapters it can carry."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gdro.models.base import FlowModel, Text


@dataclass
class Policies:
    """ "policy" is the model with the adapter being trained, "base" the frozen model without one.

    `adapters` holds the others: "ema", the moving average, and "old", which sampled the round (absent: the base did).
    """

    model: FlowModel
    conditioning: dict[str, Any]  # the groups' guidance_scale; height and width after `at`
    adapters: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters, by name."""
        return self.model.adapter()

    def at(self, height: int, width: int) -> "Policies":
        """The same for images of that size."""
        return replace(self, conditioning=self.conditioning | {"height": height, "width": width})

    def velocity(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """v_theta of the weights the model carries now: x_t (n, tokens, channels), t (n,) -> x_t's shape."""
        return self.model.velocity(x_t, t, text, **self.conditioning)

    @contextmanager
    def carrying(self, name: str) -> Iterator[None]:
        """Within it, the model is the policy called `name`."""
        if name == "policy":
            yield
        elif name == "base" or (name == "old" and name not in self.adapters):
            with self.model.adapter_disabled():
                yield
        else:
            with carrying(self.model, self.adapters[name]):
                yield


@contextmanager
def carrying(model: FlowModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, the model's adapter is `weights`; its own are restored bit for bit, even after an exception."""
    own = {name: parameter.detach().clone() for name, parameter in model.adapter().items()}
    model.load_adapter_state(weights)
    try:
        yield
    finally:
        model.load_adapter_state(own)


def ema_decay(step: int, *, warmup: float, decay: float) -> float:
    """min(warmup i, decay) at optimizer step i = 1, 2, ... (the paper: min(0.001 i, 0.5))."""
    return min(warmup * step, decay)


@torch.no_grad()
def ema_update(ema: Mapping[str, Tensor], parameters: Mapping[str, Tensor], decay: float) -> None:
    """ema <- decay ema + (1 - decay) parameters, in place; the average shares no memory with the model."""
    for name, weight in ema.items():
        weight.lerp_(parameters[name], 1 - decay)
