"""What a step reads and changes: data, policies, optimizer."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from gdro.training.batches import Batches
from gdro.training.config import TrainConfig
from gdro.training.draws import GroupDraws
from gdro.training.joined import Groups
from gdro.training.policies import Policies
from gdro.training.reference import ReferenceErrors
from gdro.training.transitions import Transitions


@dataclass(frozen=True)
class MicroBatch:
    """How much of a step goes through the model at once. It affects memory and speed, not the gradient."""

    groups: int
    images: int | None = None  # of these groups at once, with a second, backward pass; None: all, in one pass

    def images_of(self, k: int) -> int:
        """How many images go through the model at once, for groups of k."""
        return self.images or self.groups * k


@dataclass(frozen=True)
class Data:
    """The groups of a round and how its steps draw from them."""

    groups: Groups
    draws: GroupDraws
    batches: Batches
    transitions: Transitions
    reference_errors: ReferenceErrors | None  # None: the reference is evaluated at each draw
    sampler: str  # how the groups were sampled; a trajectory objective repeats its steps
    noise_level: float

    def fresh(self, step: int) -> bool:
        """Whether the policy is still the one that sampled the round: nothing was learned since."""
        return step == self.draws.done + 1


@dataclass
class Learner:
    """Everything a step reads and changes."""

    config: TrainConfig
    data: Data
    policies: Policies
    optimizer: torch.optim.Optimizer
    micro_batch: MicroBatch

    @property
    def objective(self) -> Any:
        """The objective of the configuration."""
        return self.config.objective

    def at(self, group: str) -> "Learner":
        """The same for images of that group's size."""
        return replace(self, policies=self.policies.at(*self.data.groups.image_size(group)))

    def passes(self, images: int) -> list[slice]:
        """Slices of `images` images that go through the model together."""
        size = self.micro_batch.images or images
        return [slice(first, first + size) for first in range(0, images, size)]
