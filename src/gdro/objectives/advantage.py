"""Advantages of a group's images: rewards made comparable between prompts."""

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON, LIMIT = 1e-4, 5.0


def advantages(rewards: Sequence[Tensor], kind: str, exponent: float = 0.0) -> list[Tensor]:
    """Advantages (K,) of each group's rewards (K,)."""
    if kind == "win_rate":
        rewards, kind = [win_rate(r) for r in rewards], "group"
    centred = [r - r.mean() for r in rewards]
    if kind == "group":
        return [(c / (r.std() + EPSILON)).clamp(-LIMIT, LIMIT) for c, r in zip(centred, rewards, strict=True)]
    if kind == "slas":
        centred = [c.sign() * c.abs() ** (1 + exponent) for c in centred]
    scale = torch.cat(list(rewards)).std() + EPSILON
    return [(c / scale).clamp(-LIMIT, LIMIT) for c in centred]


def win_rate(r: Tensor) -> Tensor:
    """Share of the group's other images that each beats, ties half; (K,) -> (K,)."""
    wins = (r[:, None] > r).to(r.dtype) + 0.5 * (r[:, None] == r).to(r.dtype)
    return (wins.sum(1) - 0.5) / (len(r) - 1)
