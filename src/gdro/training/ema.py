"""Exponential moving average of the adapter: its own tensors, updated once per optimizer step."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from gdro.models.base import FlowModel


def ema_decay(step: int, *, warmup: float, decay: float) -> float:
    """min(warmup i, decay) at optimizer step i = 1, 2, ... (the paper: min(0.001 i, 0.5))."""
    return min(warmup * step, decay)


class Ema:
    """weights <- decay weights + (1 - decay) parameters. Shares no memory with the model."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        for name, weight in self.weights.items():
            weight.lerp_(parameters[name], 1 - decay)

    def swapped_in(self, model: FlowModel) -> AbstractContextManager[None]:
        """Inside it the model carries the average."""
        return carrying(model, self.weights)


@contextmanager
def carrying(model: FlowModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside it the model's adapter is `weights`; its own come back bit for bit, after an exception too."""
    own = {name: parameter.detach().clone() for name, parameter in model.adapter().items()}
    model.load_adapter_state(weights)
    try:
        yield
    finally:
        model.load_adapter_state(own)
