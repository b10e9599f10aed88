"""Protocols of rewards, comparators and judges."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt

AXES = ("alignment", "coherence", "style")  # of a judge


class ImageFailure(UserError):
    """An image could not be scored: its index in the batch, and why. A failure is never a score of zero."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index, self.reason = index, reason

    def __str__(self) -> str:
        return f"image {self.index} of the batch: {self.reason}"


@dataclass(frozen=True)
class Scores:
    """One float per image, NaN where missing, and the evidence for each (recognized text, raw reply; JSON-able)."""

    values: np.ndarray  # (n,) float64
    evidence: list[dict[str, Any]]  # n


class Reward(Protocol):
    """Scores images, each one by itself."""

    @property
    def name(self) -> str:
        """File-name safe; names the rewards file."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever the same image could get a different score."""
        ...

    @property
    def parallel(self) -> bool:
        """Whether to use a process per core by default; False for rewards that may hold a GPU or a connection."""
        ...

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if a prompt lacks what this reward needs; called before any sampling."""
        ...

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Scores of n images, each independent of the others. Raises ImageFailure for one that cannot be scored."""
        ...


class GroupReward(Reward, Protocol):
    """Compares the images of a group: called with all images of one group, it scores each relative to the others."""

    @property
    def grouped(self) -> Literal[True]: ...


class Comparator(Protocol):
    """Decides which of two images of one prompt is better."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def check(self, prompts: Sequence[Prompt]) -> None: ...

    def compare(self, pairs: Sequence[tuple[Image.Image, Image.Image, Prompt]]) -> list[float | None]:
        """Per pair: 1.0 if the first is better, 0.0 if the second is, 0.5 for a tie, None without an answer."""
        ...


class Judge(Protocol):
    """Quality from 1 to 5 per axis; never sees the training reward."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def check(self, prompts: Sequence[Prompt]) -> None: ...

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """{"alignment" | "coherence" | "style": (n,) float64 in [1, 5], NaN where missing}."""
        ...
