"""Preference win rate as reward (Pref-GRPO, 2508.20751): the share of its group's other images that an image beats.

A comparator sees pairs in both orders, because judges favor a position. With all pairs this is the win rate itself;
with a budget of pairs, the rate against the whole group that a fitted Bradley-Terry model expects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from gdro.common.files import fingerprint
from gdro.common.prompts import Prompt
from gdro.common.rng import numpy_rng
from gdro.rewards.base import Comparator, Scores
from gdro.rewards.pointwise import Pointwise

PRIOR = 0.1  # virtual ties of each image with an average one, so strengths stay finite if one image always wins


def choose_pairs(count: int, budget: int | None, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of `count` images: all of them, or `budget` pairs that connect all images.

    First a random ring, so every image is compared and no subset stays disconnected, then others at random.
    """
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    if budget is None or budget >= len(pairs):
        return pairs
    ring = rng.permutation(count).tolist()
    chosen = {(min(a, b), max(a, b)) for a, b in zip(ring, [*ring[1:], ring[0]], strict=True)}
    rest = [pair for pair in pairs if pair not in chosen]
    picked = rng.permutation(len(rest))[: max(0, budget - len(chosen))]
    return sorted(chosen | {rest[i] for i in picked})


def shares(wins: np.ndarray) -> np.ndarray:
    """Win rates (K,) from the comparisons wins (K, K): wins[i, j] in [0, 1] is how far i beat j, NaN if unknown.

    Each is the mean over the opponents that i was compared with; NaN for an image without any.
    """
    known = np.isfinite(wins)
    counts = known.sum(1)
    total = np.where(known, wins, 0.0).sum(1)
    return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)


def bradley_terry(wins: np.ndarray, *, steps: int = 1000, tolerance: float = 1e-10) -> np.ndarray:
    """Strengths p (K,), mean log 0, of the model P(i beats j) = p_i / (p_i + p_j), fitted to `wins` as in `shares`.

    Maximizes the likelihood, with PRIOR ties of each image with one of strength 1, by Hunter's (2004) minorization:
    p_i = W_i / sum_j n_ij / (p_i + p_j). Every image has a finite strength, compared or not.
    """
    known = np.isfinite(wins)
    won = np.where(known, wins, 0.0).sum(1) + PRIOR / 2
    strengths = np.ones(len(wins))
    for _ in range(steps):
        met = np.where(known, 1 / (strengths[:, None] + strengths[None, :]), 0.0).sum(1) + PRIOR / (strengths + 1)
        new = won / met
        change = np.abs(np.log(new / strengths)).max()
        strengths = new
        if change < tolerance:
            break
    return strengths / np.exp(np.log(strengths).mean())


def expected_shares(wins: np.ndarray) -> np.ndarray:
    """Win rates (K,) that the fitted model expects against all others; NaN for an image never compared."""
    strengths = bradley_terry(wins)
    beats = strengths[:, None] / (strengths[:, None] + strengths[None, :])
    rates = (beats.sum(1) - 0.5) / max(1, len(wins) - 1)  # without the tie with itself
    return np.where(np.isfinite(wins).any(1), rates, np.nan)


@dataclass(frozen=True)
class WinRate:
    """Called with the images of one group. Evidence: the opponents and how far the image beat each (null: unknown)."""

    comparator: Comparator
    pairs: int | None
    both_orders: bool
    seed: int
    parallel: ClassVar[bool] = False
    grouped: ClassVar[Literal[True]] = True

    @property
    def name(self) -> str:
        return f"win_rate.{self.comparator.name}"

    @property
    def version(self) -> str:
        return fingerprint("win_rate 1", self.comparator.version, self.pairs, self.both_orders, self.seed)

    def check(self, prompts: Sequence[Prompt]) -> None:
        self.comparator.check(prompts)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        count = len(images)
        pairs = choose_pairs(count, self.pairs, numpy_rng(self.seed, "win_rate/pairs", prompts[0].id))
        symmetric = isinstance(self.comparator, Pointwise)
        turned = [] if symmetric or not self.both_orders else [(j, i) for i, j in pairs]
        asked = [*pairs, *turned]
        answers = self.comparator.compare([(images[i], images[j], prompts[i]) for i, j in asked])
        found: dict[tuple[int, int], list[float]] = {}
        for (i, j), answer in zip(asked, answers, strict=True):
            if answer is not None:
                found.setdefault((i, j) if i < j else (j, i), []).append(answer if i < j else 1 - answer)
        wins = np.full((count, count), np.nan)
        for (i, j), values in found.items():
            wins[i, j] = np.mean(values)
            wins[j, i] = 1 - wins[i, j]
        whole = len(pairs) == count * (count - 1) // 2
        rates = shares(wins) if whole else expected_shares(wins)
        return Scores(rates, [_evidence(wins[i], i, pairs) for i in range(count)])


def _evidence(row: np.ndarray, place: int, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    opponents = [j if i == place else i for i, j in pairs if place in (i, j)]
    return {"opponents": opponents, "wins": [None if np.isnan(row[j]) else float(row[j]) for j in opponents]}
