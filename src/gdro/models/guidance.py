"""Classifier-free guidance (2207.12598)."""

import torch
from torch import Tensor

from gdro.models.base import Text


def guided(velocity: Tensor, nothing: Tensor, scale: float, *, start: Tensor | None = None) -> Tensor:
    """v = start + scale (velocity - nothing); start defaults to `nothing`, so a scale of 1 means no guidance.

    Z-Image starts at `velocity`, so there a scale of 0 means no guidance. All tensors have the same shape.
    """
    return (nothing if start is None else start) + scale * (velocity - nothing)


def with_negative(text: Text) -> Text:
    """2n rows for classifier-free guidance: the prompts' tensors, then those called `negative_...`."""
    return {
        name: torch.cat([value, text[f"negative_{name}"]])
        for name, value in text.items()
        if not name.startswith("negative_")
    }
