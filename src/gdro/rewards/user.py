"""A user's own rewards and judges: `module:function`, a plain Python function whose result is checked."""

import hashlib
import math
import numbers
import os
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.plugins import load_own
from gdro.common.prompts import Prompt
from gdro.rewards.base import AXES, ImageFailure, Scores


class _UserFunction:
    """The function a spec names; pickled as its spec, so worker processes import it themselves."""

    def __init__(self, spec: str, field: str) -> None:
        self.spec, self.field = spec, field
        self._function, self._source = load_own(spec, field)
        self.name = re.sub(r"[^\w.-]", ".", spec)
        self.version = hashlib.sha256(Path(self._source).read_bytes()).hexdigest()[:12]

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.spec, self.field)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Accept all prompts: what the function needs is unknown."""

    def _result(self, images: Sequence[Image.Image], prompts: Sequence[Prompt], who: str) -> Any:
        """What the function returns; exceptions become a UserError that names its line."""
        try:
            result = self._function(list(images), list(prompts))
            return list(result) if isinstance(result, Iterator) else result  # a generator raises while it is read
        except UserError:
            raise
        except Exception as error:
            own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self._source]
            place = f" ({os.path.relpath(self._source)}, line {own[-1].lineno})" if own else ""
            raise UserError(f"{who} raised {type(error).__name__}: {error}{place}") from error


class UserReward(_UserFunction):
    """`function(images, prompts) -> one float per image`; images are PIL, prompts `gdro.common.prompts.Prompt`.

    Raises UserError if the function raises or the result has the wrong length, ImageFailure for a value that is not a
    finite number.
    """

    parallel: ClassVar[bool] = False

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        who = f'reward "{self.spec}"'
        values = _floats(self._result(images, prompts, who), len(images), who)
        return Scores(values, [{} for _ in images])


class UserJudge(_UserFunction):
    """`function(images, prompts) -> {"alignment": ..., "coherence": ..., "style": ...}`, a grade in [1, 5] per image.

    None or NaN means a missing grade.
    """

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        who = f'judge "{self.spec}"'
        result = self._result(images, prompts, who)
        if not isinstance(result, Mapping) or set(result) != set(AXES):
            found = sorted(map(str, result)) if isinstance(result, Mapping) else type(result).__name__
            raise UserError(f"{who} returned {found}; expected a dictionary with the keys {', '.join(AXES)}")
        grades = {axis: _floats(result[axis], len(images), f"{who}, {axis}", missing=True) for axis in AXES}
        for axis, values in grades.items():
            for i in np.flatnonzero((values < 1) | (values > 5)):
                raise ImageFailure(int(i), f"{who}, {axis} returned {values[i]:g}; expected 1 to 5")
        return grades


def _floats(result: Any, count: int, who: str, *, missing: bool = False) -> np.ndarray:
    """(count,) float64; UserError or ImageFailure says what is wrong with it. With `missing`, None becomes NaN."""
    try:
        if isinstance(result, str | bytes | Mapping | Set):
            raise TypeError
        iterator = iter(result)
    except TypeError:
        raise UserError(f"{who} returned a {type(result).__name__}; expected a sequence of {count} numbers") from None
    found = list(iterator)
    if len(found) != count:
        raise UserError(f"{who} returned {len(found)} values for {count} images; expected one per image")
    values = np.empty(count, np.float64)
    for i, value in enumerate(found):
        if (
            not isinstance(value, numbers.Real) and getattr(value, "shape", None) == ()
        ):  # an array's or tensor's element
            value = value.item()
        if value is None and missing:
            value = math.nan
        if not isinstance(value, numbers.Real | np.bool_):
            raise ImageFailure(i, f"{who} returned {value!r} ({type(value).__name__}); expected a number")
        if not math.isfinite(value) and not (missing and math.isnan(value)):
            raise ImageFailure(i, f"{who} returned {value}; expected a finite number")
        values[i] = float(value)
    return values
