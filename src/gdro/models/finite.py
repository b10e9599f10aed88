"""NaN and infinity, reported where they arise; otherwise they would become black images and equal rewards."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gdro.common.errors import UserError


class NotFinite(Exception):
    """NaN or infinity in row `row` of a batch; a caller that knows what the rows are names it."""

    def __init__(self, what: str, row: int) -> None:
        super().__init__(what)
        self.what, self.row = what, row


def check_weights(where: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raise UserError naming the first tensor that is not finite."""
    for name, tensor in weights:
        if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor.detach()):
            raise UserError(f"{where}: {name} holds NaN or infinity; expected finite weights")


def check_rows(what: str, batch: Tensor) -> None:
    """Raise NotFinite for the first row that is not finite."""
    finite = batch.isfinite().flatten(1).all(1)
    if not finite.all():
        raise NotFinite(f"{what} hold NaN or infinity", int(finite.logical_not().nonzero()[0]))


class Watch:
    """Whether all velocities of an integration were finite, checked once at the end so no step waits for a GPU."""

    def __init__(self) -> None:
        self._finite: list[Tensor] = []

    def see(self, velocity: Tensor) -> None:
        """Take the velocities of one call, (n, tokens, channels)."""
        self._finite.append(velocity.isfinite().flatten(1).all(1))

    def check(self, latents: Tensor) -> None:
        """Raise NotFinite for the earliest velocity that was not finite, or else for the final latents."""
        bad = torch.stack(self._finite).logical_not()
        if bad.any():
            step, row = bad.nonzero()[0].tolist()
            raise NotFinite(f"the velocities of call {step + 1} of {len(bad)} hold NaN or infinity", row)
        check_rows("the latents", latents)


@contextmanager
def naming(model: str, rows: Sequence[str]) -> Iterator[None]:
    """Turn NotFinite into a UserError that names the model and the row, such as `prompt "000001"`."""
    try:
        yield
    except NotFinite as error:
        raise UserError(
            f"model: {model}: {error.what} for {rows[error.row]}; expected finite numbers (look for NaN in weights and "
            "adapter, or for a value out of bounds, such as guidance_scale)"
        ) from None


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, found without a copy (NaN passes through min and max), dequantizing if needed."""
    if type(tensor) is not Tensor:
        tensor = tensor.dequantize()
    low, high = tensor.aminmax()
    return math.isfinite(low) and math.isfinite(high)
