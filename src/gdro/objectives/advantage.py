"""Advantages: how much better than its group an image is. Adding a constant to a group's rewards never changes them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gdro.common.ranking import win_rate

LIMIT = 5.0  # bound on |A|, as in Flow-GRPO's code
FLOOR = 1e-4  # added to every standard deviation


def advantages(rewards: Sequence[Tensor], kind: str, exponent: float = 0.0) -> list[Tensor]:
    """Advantages of whole groups: rewards (K,) each, K may differ -> (K,) each, clipped to [-5, 5].

    group: (r - mean) / (std + 1e-4) of the group (Flow-GRPO, 2505.05470). batch: the same over the std of all rewards
    given, those of a step's groups. Groups whose rewards are all equal are never among them; the authors' code counts
    them (the more there are, the smaller its std and the larger its advantages).
    slas: sign(dr) |dr|^(1 + exponent), dr = r - mean, over the std of all rewards given (2605.10937).
    win_rate: "group" applied to each image's win rate (Pref-GRPO, 2508.20751).
    Raises ValueError for any other kind.
    """
    if kind == "win_rate":
        return advantages([torch.from_numpy(win_rate(r.numpy(force=True))) for r in rewards], "group")
    if kind not in ("group", "batch", "slas"):
        raise ValueError(f"advantage: {kind!r}, expected group, batch, slas or win_rate")
    above = [r - r.mean() for r in rewards]
    if kind == "group":
        scales = [r.std(correction=0) for r in rewards]
    else:
        scales = [torch.cat(list(rewards)).std(correction=0)] * len(rewards)
    if kind == "slas":
        above = [dr.sign() * dr.abs() ** (1 + exponent) for dr in above]
    return [(dr / (scale + FLOOR)).clamp(-LIMIT, LIMIT) for dr, scale in zip(above, scales, strict=True)]
