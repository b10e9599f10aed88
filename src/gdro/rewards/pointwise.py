"""A pointwise reward used as a judge of pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gdro.common.prompts import Prompt
from gdro.rewards.base import Reward


@dataclass(frozen=True)
class Pointwise:
    """A reward as comparator: the higher score wins, equal scores tie, a missing score gives no answer."""

    reward: Reward

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def version(self) -> str:
        return self.reward.version

    def check(self, prompts: Sequence[Prompt]) -> None:
        self.reward.check(prompts)

    def compare(self, pairs: Sequence[tuple[Image.Image, Image.Image, Prompt]]) -> list[float | None]:
        places: dict[int, int] = {}  # each image is scored once
        images: list[Image.Image] = []
        prompts: list[Prompt] = []
        for first, second, prompt in pairs:
            for image in (first, second):
                if id(image) not in places:
                    places[id(image)] = len(images)
                    images.append(image)
                    prompts.append(prompt)
        scores = self.reward(images, prompts).values if images else np.zeros(0)
        signs = [float(np.sign(scores[places[id(a)]] - scores[places[id(b)]])) for a, b, _ in pairs]
        return [None if np.isnan(sign) else (sign + 1) / 2 for sign in signs]
