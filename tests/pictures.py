"""Pictures for tests."""

import numpy as np
from PIL import Image


def noise_image(width: int, height: int, seed: int) -> Image.Image:
    """The same random pixels for the same seed, on every machine."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def differ(images: list[Image.Image], others: list[Image.Image]) -> int:
    """The largest difference of a channel in gray levels. Two ways to one picture may differ by rounding: by one."""
    assert [image.size for image in images] == [image.size for image in others]
    pairs = zip(images, others, strict=True)
    return max(int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()) for a, b in pairs)
