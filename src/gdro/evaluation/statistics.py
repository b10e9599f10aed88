"""The corrected score, and a paired bootstrap over prompt texts. Shapes: (P, n) = prompts, images per prompt.

Prompt files repeat texts (GenEval's four times). Means are over prompts, but prompts with the same text are not
independent, so intervals resample distinct texts, each with all its prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gdro.common.prompts import same_text
from gdro.common.rng import numpy_rng
from gdro.rewards.base import AXES

_BLOCK = 1000  # resamples per generator; part of the definition of the draws, not a tuning knob


def corrected_axes(reward: str) -> tuple[str, ...]:
    """Judge axes that u averages for a reward of this name; those with "geneval" in it exclude alignment.

    Alignment rises with hacking there (the GDRO paper, on GenEval).
    """
    return AXES[1:] if "geneval" in reward else AXES


def corrected_score(reward: np.ndarray, axes: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """r (u - 3) + 0.2 elementwise, where u is the mean of the axes `names` (1 to 5); NaN where a grade is missing."""
    quality = np.mean([axes[name] for name in names], axis=0)
    return np.asarray(reward, dtype=np.float64) * (quality - 3.0) + 0.2


@dataclass(frozen=True)
class Comparison:
    """Means over prompts, their difference, and its 95 % interval over texts; NaN where undefined."""

    base: float
    tuned: float
    gain: float
    ci95: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        return {k: list(map(_finite, v)) if k == "ci95" else _finite(v) for k, v in asdict(self).items()}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def pair_means(base: np.ndarray, tuned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per-prompt means (P,) of two (P, n) arrays over the images with a value in both; NaN if there are none."""
    present = np.isfinite(base) & np.isfinite(tuned)
    count = present.sum(axis=1)
    safe = np.maximum(count, 1)
    means = [np.where(count > 0, np.where(present, v, 0.0).sum(axis=1) / safe, np.nan) for v in (base, tuned)]
    return means[0], means[1]


def text_numbers(texts: Sequence[str]) -> np.ndarray:
    """The number (P,) of each prompt's text, counting distinct texts from 0 in order of appearance."""
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(same_text(text), len(seen)) for text in texts], dtype=np.int64)


def resampled_means(values: np.ndarray, numbers: np.ndarray, *, samples: int, seed: int) -> np.ndarray:
    """Means (samples, M) of the columns of `values` (P, M) over the prompts of texts drawn with replacement.

    `numbers` (P,) are the prompts' `text_numbers`.

    All columns share each draw, so any function of the columns keeps their pairing. NaN cells are left out of their
    column's mean; a resample with only NaN is NaN.
    """
    present = np.isfinite(values)
    filled = np.where(present, values, 0.0)
    _, numbers = np.unique(numbers, return_inverse=True)
    texts = int(numbers.max()) + 1
    stacked = np.zeros((texts, 2 * values.shape[1]))
    np.add.at(stacked, numbers, np.hstack([filled, present.astype(np.float64)]))
    uniform = np.full(texts, 1.0 / texts)
    out = np.empty((samples, values.shape[1]))
    for start in range(0, samples, _BLOCK):
        counts = numpy_rng(seed, "bootstrap", start // _BLOCK).multinomial(texts, uniform, size=_BLOCK)
        sums, weights = np.hsplit(counts[: samples - start].astype(np.float64) @ stacked, 2)
        with np.errstate(invalid="ignore"):
            out[start : start + _BLOCK] = sums / np.where(weights > 0, weights, np.nan)
    return out


def interval(draws: np.ndarray, texts: int) -> tuple[float, float]:
    """95 % percentile interval of bootstrap draws (B,).

    NaN for fewer than two distinct texts: one text, however often repeated, says nothing about how texts differ, and
    its bootstrap interval of width zero would claim certainty.
    """
    draws = draws[np.isfinite(draws)]
    if texts < 2 or not len(draws):
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def compare(
    metrics: Mapping[str, tuple[np.ndarray, np.ndarray]], texts: Sequence[str], *, samples: int, seed: int
) -> dict[str, Comparison]:
    """Paired comparison of named per-prompt values (base (P,), tuned (P,)) by bootstrap over the prompts' `texts`.

    All metrics share the resamples. A prompt with a NaN on either side is left out of that metric.
    """
    names = list(metrics)
    pairs = np.stack([np.stack(metrics[name], axis=1) for name in names], axis=1).astype(np.float64)  # (P, M, 2)
    pairs[~np.isfinite(pairs).all(axis=2)] = np.nan
    numbers = text_numbers(texts)
    draws = resampled_means(pairs.reshape(len(pairs), -1), numbers, samples=samples, seed=seed)
    draws = draws.reshape(samples, len(names), 2)
    out = {}
    for i, name in enumerate(names):
        there = np.isfinite(pairs[:, i, 0])
        kept, counted = pairs[there, i], len(np.unique(numbers[there]))
        base, tuned = kept.mean(axis=0) if len(kept) else (np.nan, np.nan)
        out[name] = Comparison(
            float(base), float(tuned), float(tuned - base), interval(draws[:, i, 1] - draws[:, i, 0], counted)
        )
    return out


def relative_change(
    base: np.ndarray, tuned: np.ndarray, texts: Sequence[str], *, samples: int, seed: int
) -> tuple[float, float, float]:
    """(tuned mean - base mean) / |base mean| of per-prompt values (P,), with its paired 95 % interval.

    NaN where the base mean is zero.
    """
    pairs = np.stack([base, tuned], axis=1).astype(np.float64)
    there = np.isfinite(pairs).all(axis=1)
    pairs, numbers = pairs[there], text_numbers(texts)[there]
    if not len(pairs) or pairs[:, 0].mean() == 0:
        return float("nan"), float("nan"), float("nan")
    draws = resampled_means(pairs, numbers, samples=samples, seed=seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (draws[:, 1] - draws[:, 0]) / np.abs(draws[:, 0])
    low, high = interval(ratios, len(np.unique(numbers)))
    first, second = pairs.mean(axis=0)
    return float((second - first) / abs(first)), low, high
