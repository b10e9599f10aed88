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
from gdro.training.batch import Visit


class ReferenceErrors:
    """What is known of each of `stores`: float32, one row an image and one column a draw, NaN where nothing is.

    Whatever else they depend on a run may not change. Every process knows the same at the end of a step.
    """

    def __init__(self, stores: Sequence[GroupStore], draws: int) -> None:
        self._values: dict[str, Tensor] = {}  # by a digest of the store's images
        self._rows: dict[str, Tensor] = {}  # a group's, views of its store's
        self._new: list[tuple[str, list[int], int, list[float]]] = []  # of this process in this step
        for store in stores:
            groups = store.group_ids
            values = torch.full((sum(map(store.size, groups)), draws), torch.nan)
            self._values[fingerprint(store.contents)] = values
            self._rows |= zip(groups, values.split([store.size(group) for group in groups]), strict=True)

    def of(self, visits: Sequence[Visit], draws: Sequence[int]) -> Tensor:
        """(g, k) on the CPU: d_ref of the visits' images at each visit's draw; NaN where it is not known."""
        return torch.stack([self._rows[v.group][v.images, draw] for v, draw in zip(visits, draws, strict=True)])

    def missing(self, visits: Sequence[Visit], draws: Sequence[int]) -> int:
        """How many different errors of these visits are not known."""
        pairs = zip(visits, draws, self.of(visits, draws).isnan(), strict=True)
        return len({(v.group, image, draw) for v, draw, new in pairs for image in v.images[new].tolist()})

    def keep(self, visits: Sequence[Visit], draws: Sequence[int], errors: Tensor) -> None:
        """Take errors (g, k), on the CPU."""
        for visit, draw, found in zip(visits, draws, errors, strict=True):
            self._rows[visit.group][visit.images, draw] = found
            self._new.append((visit.group, visit.images.tolist(), draw, found.tolist()))

    def share(self) -> None:
        """Tell the other processes what is new; of several that computed one error, all take the first one's."""
        for new in reversed(distributed.gather(self._new)):
            for group, images, draw, found in new:
                self._rows[group][images, draw] = torch.tensor(found)
        self._new = []

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: what is known of each store, by its digest."""
        return dict(self._values)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Know what was known at the checkpoint, of the stores that are still trained on."""
        for digest, values in self._values.items():
            if digest in state:
                values.copy_(state[digest])
