"""A score's rank within its group."""

import numpy as np


def win_rate(scores: np.ndarray) -> np.ndarray:
    """The share of the group's other scores (K,) that each beats, ties counting half; NaN stays NaN, one alone is 1/2.

    Pref-GRPO (2508.20751), with scores instead of a judge of pairs. The group's mean is 1/2.
    """
    present = np.isfinite(scores)
    values = scores[present]
    wins = (np.sign(values[:, None] - values[None, :]) + 1).sum(1) / 2 - 0.5  # it ties with itself
    out = np.full(scores.shape, np.nan)
    out[present] = wins / (len(values) - 1) if len(values) > 1 else 0.5
    return out
