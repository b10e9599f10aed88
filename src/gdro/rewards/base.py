"""What a reward and a judge are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt

AXES = ("alignment", "coherence", "style")  # of a judge


class ImageFailure(UserError):
    """An image that could not be scored: its place in the batch and why. A failure is never a score of zero."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index, self.reason = index, reason

    def __str__(self) -> str:
        return f"image {self.index} of the batch: {self.reason}"


@dataclass(frozen=True)
class Scores:
    """One float per image, NaN where it is missing, and what each rests on (recognized text, raw reply; JSON-able)."""

    values: np.ndarray  # (n,) float64
    evidence: list[dict[str, Any]]  # n


class Reward(Protocol):
    @property
    def name(self) -> str:
        """File-name safe; names the rewards file."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever the same image could get another score."""
        ...

    @property
    def parallel(self) -> bool:
        """Whether to score in a process a core unless told otherwise; False for what may hold a GPU or a connection."""
        ...

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if a prompt lacks what this reward needs; called before any sampling."""
        ...

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Scores of the images; one image's score does not depend on the others. Raises ImageFailure."""
        ...


class GroupReward(Reward, Protocol):
    """Compares the images of a group: it is called with all of one group's, and a score is relative to them."""

    @property
    def grouped(self) -> Literal[True]: ...


class Comparator(Protocol):
    """Tells which of two images of one prompt is better."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def check(self, prompts: Sequence[Prompt]) -> None: ...

    def compare(self, pairs: Sequence[tuple[Image.Image, Image.Image, Prompt]]) -> list[float | None]:
        """1.0 where the first is better, 0.0 where the second is, 0.5 for a tie, None where there is no answer."""
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
