"""Size of an image as JPEG of quality 95 (DDPO's compressibility and incompressibility, as in Flow-GRPO)."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import ClassVar

import numpy as np
from PIL import Image, features

from gdro.common.files import fingerprint
from gdro.common.images import to_rgb
from gdro.common.prompts import Prompt
from gdro.rewards.base import Scores

QUALITY = 95
SCALE = 500.0  # kB; Flow-GRPO divides compressibility by it and leaves incompressibility in kB


def jpeg_kilobytes(image: Image.Image) -> float:
    """Size in kB (1000 bytes) as JPEG of QUALITY, without metadata."""
    buffer = BytesIO()
    bare = Image.fromarray(np.asarray(to_rgb(image)))  # without the file's metadata
    bare.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000


@dataclass(frozen=True)
class JpegReward:
    """`sign` -1: -kB / 500, so small files are best; +1: kB. Evidence: `kilobytes`."""

    sign: int
    parallel: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "jpeg_compressibility" if self.sign < 0 else "jpeg_incompressibility"

    @property
    def version(self) -> str:
        """Rule and encoder: other libraries write other bytes."""
        return fingerprint(
            "rule 1", self.name, QUALITY, SCALE, features.version("jpg"), features.version("libjpeg_turbo")
        )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Any prompt will do."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        sizes = np.asarray([jpeg_kilobytes(image) for image in images], np.float64)
        return Scores(-sizes / SCALE if self.sign < 0 else sizes, [{"kilobytes": float(kb)} for kb in sizes])


def jpeg_compressibility() -> JpegReward:
    """Minus the size in kB over 500."""
    return JpegReward(-1)


def jpeg_incompressibility() -> JpegReward:
    """The size in kB."""
    return JpegReward(1)
