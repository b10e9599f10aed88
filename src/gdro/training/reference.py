"""The reference's errors d_ref on a fixed pool of draws, each computed once: four bytes instead of a forward pass.

With t and eps drawn from a pool of N for each group, the frozen base's errors are one scalar per (image, draw). They
are part of every checkpoint, so a resumed run knows exactly what was known there, and neither its results nor its
counts depend on how far a killed process got.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gdro.common import distributed
from gdro.common.files import fingerprint
from gdro.groups.store import GroupStore
from gdro.training.draws import GroupDraw


class ReferenceErrors:
    """The errors known for each of `stores`: float32, a row per image, a column per pool entry, NaN where unknown.

    Nothing else they depend on can change within a run. At the end of a step every process knows the same errors.
    """

    def __init__(self, stores: Sequence[GroupStore], pool: int) -> None:
        self._values: dict[str, Tensor] = {}  # by a digest of the store's images
        self._rows: dict[str, Tensor] = {}  # by group, views into its store's
        self._new: list[tuple[str, list[int], int, list[float]]] = []  # by this process in this step
        for store in stores:
            groups = store.group_ids
            values = torch.full((sum(map(store.size, groups)), pool), torch.nan)
            self._values[fingerprint(store.contents)] = values
            self._rows |= zip(groups, values.split([store.size(group) for group in groups]), strict=True)

    def of(self, draws: Sequence[GroupDraw], places: Sequence[int]) -> Tensor:
        """d_ref (g, k) of the images, on the CPU, each draw at its pool entry; NaN where unknown."""
        return torch.stack([self._rows[v.group][v.images, place] for v, place in zip(draws, places, strict=True)])

    def missing(self, draws: Sequence[GroupDraw], places: Sequence[int]) -> int:
        """How many distinct errors of these draws are unknown."""
        pairs = zip(draws, places, self.of(draws, places).isnan(), strict=True)
        return len({(v.group, image, place) for v, place, new in pairs for image in v.images[new].tolist()})

    def keep(self, draws: Sequence[GroupDraw], places: Sequence[int], errors: Tensor) -> None:
        """Store errors (g, k), on the CPU."""
        for draw, place, found in zip(draws, places, errors, strict=True):
            self._rows[draw.group][draw.images, place] = found
            self._new.append((draw.group, draw.images.tolist(), place, found.tolist()))

    def share(self) -> None:
        """Exchange new errors with the other processes; if several computed the same one, the first one's is kept."""
        for new in reversed(distributed.gather(self._new)):
            for group, images, place, found in new:
                self._rows[group][images, place] = torch.tensor(found)
        self._new = []

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: the known errors of each store, by its digest."""
        return dict(self._values)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the errors of a checkpoint, for the stores that are still trained on."""
        for digest, values in self._values.items():
            if digest in state:
                values.copy_(state[digest])
