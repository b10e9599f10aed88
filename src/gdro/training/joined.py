"""The groups that training reads, from one or several rounds."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from gdro.groups.store import GroupStore
from gdro.models.base import Text
from gdro.samplers.trajectory import Trajectory


class Groups(Protocol):
    """The part of groups.store.GroupStore that training uses."""

    def image_size(self, group_id: str) -> tuple[int, int]:
        """(height, width) of the group's images, in pixels."""

    def latents(self, group_id: str) -> Tensor:
        """Latents (K, tokens, channels), float32."""

    def text(self, group_id: str) -> Text:
        """Text embeddings; first axis 1."""

    def trajectory(self, group_id: str) -> Trajectory:
        """The group's trajectory; UserError if there is none."""


class Joined:
    """The stores of several rounds, read as one; their groups have different ids."""

    def __init__(self, stores: Sequence[GroupStore]) -> None:
        self._store = {group: store for store in stores for group in store.group_ids}

    def image_size(self, group_id: str) -> tuple[int, int]:
        return self._store[group_id].image_size(group_id)

    def latents(self, group_id: str) -> Tensor:
        return self._store[group_id].latents(group_id)

    def text(self, group_id: str) -> Text:
        return self._store[group_id].text(group_id)

    def trajectory(self, group_id: str) -> Trajectory:
        return self._store[group_id].trajectory(group_id)
