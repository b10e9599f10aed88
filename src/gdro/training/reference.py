"""The reference's errors d_ref on a fixed pool of draws, each computed once: four bytes instead of a forward pass.

With t and eps drawn from a pool of N for each group, the frozen base's errors are scalars of (image, draw). They lie in
`_reference-<digest>.npy` beside the groups, float32, one row an image of the store and one column a draw, NaN where
none was computed yet; the digest names whatever they depend on, so a file is never met by another run's values.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdro import distributed
from gdro.errors import UserError
from gdro.files import atomic_path, fingerprint
from gdro.groups.store import GroupStore
from gdro.training.batch import Visit


class ReferenceErrors:
    """Reads and fills the files of `stores`; `made_with`: weights, geometry and pool, all that the errors depend on.

    Several processes may fill one file: each value is written whole, and whoever computes it finds the same.
    Raises UserError if a file is damaged or cannot be written.
    """

    def __init__(self, stores: Sequence[GroupStore], *, draws: int, made_with: Mapping[str, Any]) -> None:
        self._rows: dict[str, tuple[np.ndarray, int]] = {}  # group -> (values of its store, its first row)
        for store in stores:
            digest = fingerprint(dict(made_with), draws, store.contents)
            sizes = {group: store.size(group) for group in store.group_ids}
            values = _opened(store.folder / f"_reference-{digest}.npy", (sum(sizes.values()), draws))
            first = 0
            for group, size in sizes.items():
                self._rows[group] = values, first
                first += size

    def of(self, visits: Sequence[Visit], draws: Sequence[int]) -> Tensor:
        """(g, k) float32 on the CPU: d_ref of the visits' images at each visit's draw; NaN where it is not known."""
        rows = []
        for visit, draw in zip(visits, draws, strict=True):
            values, first = self._rows[visit.group]
            rows.append(torch.from_numpy(values[first + visit.images.numpy(), draw]))
        return torch.stack(rows)

    def keep(self, visits: Sequence[Visit], draws: Sequence[int], errors: Tensor) -> None:
        """Write errors (g, k), on the CPU."""
        for visit, draw, found in zip(visits, draws, errors, strict=True):
            values, first = self._rows[visit.group]
            values[first + visit.images.numpy(), draw] = found.numpy()


def _opened(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The file, mapped to memory; made whole at first, so that filling it in never changes its length."""
    if distributed.is_first() and not path.exists():
        with atomic_path(path) as tmp, open(tmp, "wb") as file:
            np.save(file, np.full(shape, np.nan, np.float32))
    distributed.wait()
    try:
        np.load(path, mmap_mode="r")  # refuses a file cut short, which "r+" would lengthen
        values = np.load(path, mmap_mode="r+")
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to compute it again") from None
    if values.shape != shape or values.dtype != np.float32:
        raise UserError(f"{path} holds {values.dtype} of {values.shape}, expected float32 of {shape}; delete it")
    return values
