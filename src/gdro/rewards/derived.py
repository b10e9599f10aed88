"""Rewards computed from the scores of others: transformed, standardized, weighted, summed.

They look at no image: each term's scores are in their own file, so changing weights rescores nothing. A term is
transformed, then standardized, then weighted. A score missing in one term is missing in the sum.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gdro.common.errors import UserError, did_you_mean
from gdro.common.files import fingerprint
from gdro.common.prompts import Prompt
from gdro.common.ranking import win_rate
from gdro.common.validation import show
from gdro.rewards.base import Reward

Transform = tuple[str, tuple[float, ...]]
"""Its name and its parameters."""
Groups = Mapping[str, np.ndarray]
"""Group id -> (K,) float64 scores, NaN where missing."""


def hp_edit(scores: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(5 - 2 s)): spreads a judge's 0 to 5 around 2.5 (HP-Edit); any shape."""
    return 1 / (1 + np.exp(5 - 2 * scores))


def clip(scores: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scores clipped to [low, high]; any shape."""
    return np.clip(scores, low, high)


def rank(scores: np.ndarray) -> np.ndarray:
    """One group's distinct scores (K,), equally spaced from 0 to 1; 1/2 if all are equal."""
    present = np.isfinite(scores)
    levels, place = np.unique(scores[present], return_inverse=True)
    out = np.full(scores.shape, np.nan)
    out[present] = place / (len(levels) - 1) if len(levels) > 1 else 0.5
    return out


TRANSFORMS: dict[str, tuple[Callable[..., np.ndarray], int]] = {  # function, number of parameters
    "hp_edit": (hp_edit, 0),
    "clip": (clip, 2),
    "rank": (rank, 0),
    "win_rate": (win_rate, 0),
}
RELATIVE = {"rank", "win_rate"}  # to the other images of the group


@dataclass(frozen=True)
class Term:
    """One reward in a weighted sum."""

    reward: Reward
    weight: float
    transforms: tuple[Transform, ...]
    standardize: bool

    def transformed(self, groups: Groups) -> dict[str, np.ndarray]:
        """The groups' scores after all transforms, in order."""
        out = {group: np.asarray(scores, np.float64) for group, scores in groups.items()}
        for name, numbers in self.transforms:
            out = {group: TRANSFORMS[name][0](scores, *numbers) for group, scores in out.items()}
        return out


@dataclass(frozen=True)
class DerivedReward:
    """Sum over the terms of weight x (s - mean) / std, or weight x s if a term is not standardized.

    Mean and std are constants of the run, taken from the images it was first trained on.
    """

    terms: tuple[Term, ...]

    @property
    def name(self) -> str:
        parts = [".".join([term.reward.name, *(name for name, _ in term.transforms)]) for term in self.terms]
        return "+".join(parts)

    @property
    def version(self) -> str:
        return fingerprint([[t.reward.version, t.weight, t.transforms, t.standardize] for t in self.terms])

    @property
    def relative(self) -> bool:
        """Whether any term only compares the images of a group."""
        return any(is_relative(t.reward) or RELATIVE & {name for name, _ in t.transforms} for t in self.terms)

    @property
    def standardizes(self) -> bool:
        """Whether any term is standardized."""
        return any(term.standardize for term in self.terms)

    def check(self, prompts: Sequence[Prompt]) -> None:
        for term in self.terms:
            term.reward.check(prompts)

    def constants(self, scores: Sequence[Groups]) -> list[tuple[float, float]]:
        """(mean, standard deviation) of each transformed term over all images; (0, 1) if it is not standardized."""
        found = []
        for term, groups in zip(self.terms, scores, strict=True):
            values = np.concatenate(list(term.transformed(groups).values()))
            values = values[np.isfinite(values)]
            if not term.standardize:
                found.append((0.0, 1.0))
                continue
            if not len(values) or values.std() == 0:
                raise UserError(
                    f'score.reward: "{term.reward.name}" gives all images the same score, or none, so it cannot be '
                    "standardized (set standardize: false, or leave it out)"
                )
            found.append((float(values.mean()), float(values.std())))
        return found

    def combined(self, scores: Sequence[Groups], constants: Sequence[tuple[float, float]]) -> dict[str, np.ndarray]:
        """Group id -> (K,) scores, combined from those of each term."""
        total: dict[str, np.ndarray] = {}
        for term, groups, (mean, std) in zip(self.terms, scores, constants, strict=True):
            for group, values in term.transformed(groups).items():
                part = term.weight * (values - mean) / std
                total[group] = total[group] + part if group in total else part
        return total


Scorer = Reward | DerivedReward


def is_relative(reward: Scorer) -> bool:
    """Whether scores only compare the images of a group, so they mean nothing between models."""
    return reward.relative if isinstance(reward, DerivedReward) else bool(getattr(reward, "grouped", False))


def base_rewards(reward: Scorer) -> list[Reward]:
    """The rewards that look at images."""
    return [term.reward for term in reward.terms] if isinstance(reward, DerivedReward) else [reward]


def parse_transforms(value: Any, field: str) -> tuple[Transform, ...]:
    """A transform's name, {name: parameters}, or a list of these in order; null means none. UserError otherwise."""
    if value is None:
        return ()
    return tuple(_parsed(value if isinstance(value, list) else [value], field))


def _parsed(values: Sequence[Any], field: str) -> Iterator[Transform]:
    for value in values:
        named = value if isinstance(value, dict) else {value: []}
        name, numbers = next(iter(named.items()), (None, []))
        if len(named) != 1 or not isinstance(name, str) or name not in TRANSFORMS:
            raise UserError(f"{field} is {show(value)}{did_you_mean(str(name), TRANSFORMS)}")
        count = TRANSFORMS[name][1]
        numbers = numbers if isinstance(numbers, list) else [numbers]
        if len(numbers) != count or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
            raise UserError(f"{field}.{name} has {show(numbers)}; expected a list of {count} numbers")
        if name == "clip" and not numbers[0] < numbers[1]:
            raise UserError(f"{field}.clip has {show(numbers)}; expected the lower bound first")
        yield name, tuple(map(float, numbers))
