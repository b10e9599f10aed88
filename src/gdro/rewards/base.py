"""What a reward and a judge are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from gdro.prompts import Prompt


@dataclass(frozen=True)
class Scores:
    """One float per image, and what each rests on (recognised text, detections, raw reply; JSON-able)."""

    values: np.ndarray  # (n,) float64
    evidence: list[dict[str, Any]]  # n


class Reward(Protocol):
    name: str  # file-name safe; names the rewards file
    version: str  # changes whenever the same image could get another score

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if a prompt lacks what this reward needs; called before any sampling."""
        ...

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores: ...


class Judge(Protocol):
    """Quality from 1 to 5 per axis; never sees the training reward."""

    name: str
    version: str

    def check(self, prompts: Sequence[Prompt]) -> None: ...

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """{"alignment" | "coherence" | "style": (n,) float64 in [1, 5]}."""
        ...
