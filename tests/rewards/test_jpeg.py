"""JPEG sizes: what compresses well scores high, and the published scale."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from gdro.common.prompts import Prompt
from gdro.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility, jpeg_kilobytes

PROMPTS = [Prompt("a", "x"), Prompt("b", "y")]


def pictures() -> list[Image.Image]:
    """A flat one and one of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return [Image.new("RGB", (64, 64), "navy"), Image.fromarray(noise)]


def test_kilobytes_are_the_files_size() -> None:
    for image in pictures():
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        assert jpeg_kilobytes(image) == len(buffer.getvalue()) / 1000


def test_flat_is_compressible_and_noise_is_not() -> None:
    small, large = (jpeg_kilobytes(image) for image in pictures())
    assert 0.3 < small < 2 < 5 < large
    scores = jpeg_compressibility()(pictures(), PROMPTS)
    assert scores.values == pytest.approx([-small / 500, -large / 500])
    assert scores.evidence == [{"kilobytes": small}, {"kilobytes": large}]
    assert jpeg_incompressibility()(pictures(), PROMPTS).values == pytest.approx([small, large])


def test_only_pixels_count() -> None:
    """Not the mode, nor metadata: a comment or an ICC profile would add bytes that no one sees."""
    image = pictures()[1]
    size = jpeg_kilobytes(image)
    assert jpeg_kilobytes(image.convert("RGBA")) == size
    image.info.update(comment=b"x" * 5000, icc_profile=b"y" * 5000)
    assert jpeg_kilobytes(image) == size
    assert jpeg_kilobytes(Image.new("L", (64, 64))) == jpeg_kilobytes(Image.new("RGB", (64, 64)))


def test_two_rewards() -> None:
    rewards = [jpeg_compressibility(), jpeg_incompressibility()]
    assert [r.name for r in rewards] == ["jpeg_compressibility", "jpeg_incompressibility"]
    assert rewards[0].version != rewards[1].version
    assert all(r.parallel for r in rewards)
    assert pickle.loads(pickle.dumps(rewards)) == rewards
    for reward in rewards:
        reward.check(PROMPTS)
