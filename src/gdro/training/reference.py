"""The reference's errors d_ref on a fixed pool of draws, each computed once: four bytes instead of a forward pass.

With t and eps drawn from a pool of N for each group, the frozen base's errors are scalars of (image, draw). They are
part of what a checkpoint holds, so that a run which goes on from one knows what it knew there, and neither what it
computes nor what it counts depends on what a killed process had come to.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gdro.common import distributed
from gdro.common.files import fingerprint
from gdro.groups.store import GroupStore
from gdro.training.draws import GroupDraw


class ReferenceErrors:
    """What is known of each of `stores`: float32, a row an image, a column a place of the pool, NaN where nothing is.

    Whatever else they depend on a run may not change. Every process knows the same at the end of a step.
    """

    def __init__(self, stores: Sequence[GroupStore], pool: int) -> None:
        self._values: dict[str, Tensor] = {}  # by a digest of the store's images
        self._rows: dict[str, Tensor] = {}  # a group's, views of its store's
        self._new: list[tuple[str, list[int], int, list[float]]] = []  # of this process in this step
        for store in stores:
            groups = store.group_ids
            values = torch.full((sum(map(store.size, groups)), pool), torch.nan)
            self._values[fingerprint(store.contents)] = values
            self._rows |= zip(groups, values.split([store.size(group) for group in groups]), strict=True)

    def of(self, draws: Sequence[GroupDraw], places: Sequence[int]) -> Tensor:
        """(g, k) on the CPU: d_ref of the images, each draw at its place of the pool; NaN where it is not known."""
        return torch.stack([self._rows[v.group][v.images, place] for v, place in zip(draws, places, strict=True)])

    def missing(self, draws: Sequence[GroupDraw], places: Sequence[int]) -> int:
        """How many different errors of these draws are not known."""
        pairs = zip(draws, places, self.of(draws, places).isnan(), strict=True)
        return len({(v.group, image, place) for v, place, new in pairs for image in v.images[new].tolist()})

    def keep(self, draws: Sequence[GroupDraw], places: Sequence[int], errors: Tensor) -> None:
        """Take errors (g, k), on the CPU."""
        for draw, place, found in zip(draws, places, errors, strict=True):
            self._rows[draw.group][draw.images, place] = found
            self._new.append((draw.group, draw.images.tolist(), place, found.tolist()))

    def share(self) -> None:
        """Tell the other processes what is new; of several that computed one error, all take the first one's."""
        for new in reversed(distributed.gather(self._new)):
            for group, images, place, found in new:
                self._rows[group][images, place] = torch.tensor(found)
        self._new = []

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: what is known of each store, by its digest."""
        return dict(self._values)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Know what was known at the checkpoint, of the stores that are still trained on."""
        for digest, values in self._values.items():
            if digest in state:
                values.copy_(state[digest])
