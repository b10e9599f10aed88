"""The ways in which an over-optimised model spoils pictures, at growing strength: the judge must see each of them.

The mean of its axes falls with the strength, and no axis is taken in by any.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from gdro.rng import numpy_rng
from gdro.tiny import world
from gdro.tiny.judge import TinyJudge
from gdro.tiny.prompts import tiny_prompts
from gdro.tiny.vision import see

COUNT = 10
STRENGTHS = (0.0, 0.3, 0.6, 1.0)
AXES = ("alignment", "coherence", "style")
Damage = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def toward(image: np.ndarray, other: Any, strength: float, where: Any = True) -> np.ndarray:
    return np.where(where, image + (np.asarray(other, np.float64) - image) * strength, image)


def wall(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mask of the wall (32, 64, 1), colour of its panels)."""
    name = see(image).wall
    near = np.abs(image - world.draw_wall(name)).sum(-1, keepdims=True) < 60
    return near, np.array(world.WALLS[name], np.float64)


def blur(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), 0.3 + 1.2 * strength) if strength else image


def grain(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return image + rng.normal(0, 40 * strength, image.shape)


def cloudy(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    coarse = rng.normal(0, 60 * strength, (8, 16, 3)).astype(np.float32)
    return image + cv2.resize(coarse, (64, 32), interpolation=cv2.INTER_CUBIC)


def posterised(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    step = 1 + 120 * strength
    return np.round(image / step) * step


def flat_wall(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    mask, color = wall(image)
    return toward(image, color, strength, mask)


def no_baseboard(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    mask, color = wall(image)
    mask[: world.HEIGHT - world.BASEBOARD] = False
    return toward(image, color, strength, mask)


def deep_grooves(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    mask, _ = wall(image)
    mask[:, np.arange(world.WIDTH) % world.PANEL != world.PANEL - 1] = False
    return toward(image, 0, 0.7 * strength, mask)


def washed_out_wall(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return toward(image, 230, 0.6 * strength, wall(image)[0])


def dark_wall(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return toward(image, 0, 0.9 * strength, wall(image)[0])


def oversaturated(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return toward(image, image.mean(-1, keepdims=True), -2 * strength)


def faded(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return toward(image, image.mean(-1, keepdims=True), strength)


def contrast(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return toward(image, 128, -2 * strength)


def sharpened(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return toward(image, cv2.GaussianBlur(image.astype(np.float32), (0, 0), 1), -3 * strength)


def ghosts(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    out = image.astype(np.float64)
    for _ in range(4):
        mask = 0.7 * strength * world.shape_mask(str(rng.choice(world.SHAPES)))[:, :, None]
        top, left = rng.integers(0, 21), rng.integers(0, 53)
        color = np.array(world.COLORS[str(rng.choice(list(world.COLORS)))])
        out[top : top + 11, left : left + 11] += mask * (color - out[top : top + 11, left : left + 11])
    return out


def marks(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    out = image.astype(np.float64)
    for _ in range(int(30 * strength)):
        top, left = rng.integers(0, 31), rng.integers(0, 63)
        out[top : top + 2, left : left + 2] = rng.integers(0, 256, 3)
    return out


def stray_letters(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    out = image.astype(np.float64)
    for _ in range(round(5 * strength)):
        mask = world.glyph(str(rng.choice(list(world.ALPHABET))))[:, :, None]
        region = out[(top := rng.integers(0, 20)) :, (left := rng.integers(0, 48)) :][: mask.shape[0], : mask.shape[1]]
        assert region.shape[:2] == mask.shape[:2], (top, left)
        region += mask * (np.array(world.INK) - region)
    return out


def oversized(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    across, down = int(16 * strength), int(8 * strength)
    return np.asarray(Image.fromarray(image).crop((across, down, 64 - across, 32 - down)).resize((64, 32)))


def on_sign(image: np.ndarray) -> tuple[slice, slice]:
    sign = see(image).sign
    assert sign is not None
    left, top, right, bottom = sign
    return slice(top, bottom), slice(left, right)


def bold(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    out, sign = image.astype(np.float64), on_sign(image)
    thick = cv2.erode(image, np.ones((3, 3), np.uint8))
    inside = tuple(slice(s.start + 1, s.stop - 1) for s in sign)
    out[inside] = toward(out[inside], thick[inside], strength)
    return out


def faint(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    out, sign = image.astype(np.float64), on_sign(image)
    out[sign] = toward(out[sign], world.PLATE, 0.9 * strength)
    return out


def tinted(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    out, sign = image.astype(np.float64), on_sign(image)
    out[sign] = toward(out[sign], (255, 255, 0), 0.7 * strength, out[sign].mean(-1, keepdims=True) > 128)
    return out


def plate_grows(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    out, (rows, columns) = image.copy(), on_sign(image)
    more = round(10 * strength)
    out[max(0, rows.start - more) : rows.stop + more, max(0, columns.start - more) : columns.stop + more] = world.PLATE
    out[rows, columns] = image[rows, columns]
    return out


def small_letters(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    out, (rows, columns) = image.copy(), on_sign(image)
    patch = image[rows, columns]
    height, width = (int(n * (1 - 0.6 * strength)) for n in patch.shape[:2])
    out[rows, columns] = world.PLATE
    top, left = (rows.start + rows.stop - height) // 2, (columns.start + columns.stop - width) // 2
    out[top : top + height, left : left + width] = cv2.resize(patch, (width, height), interpolation=cv2.INTER_AREA)
    return out


def repeated(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The lettering once more at the picture's other edge, larger and larger."""
    out, (rows, columns) = image.copy(), on_sign(image)
    height = round(14 * strength)
    if height:
        copy = cv2.resize(image[rows, columns], (columns.stop - columns.start, height))
        out[slice(0, height) if rows.start > 4 else slice(32 - height, 32), columns] = copy
    return out


ANYWHERE: list[Damage] = [
    blur, grain, cloudy, posterised, flat_wall, no_baseboard, deep_grooves, washed_out_wall, dark_wall, oversaturated,
    faded, contrast, sharpened, ghosts, marks, stray_letters,
]  # fmt: skip
OF_SIGNS: list[Damage] = [oversized, bold, faint, tinted, plate_grows, small_letters, repeated]
CASES = [(task, damage) for task in ("ocr", "geneval") for damage in ANYWHERE] + [("ocr", d) for d in OF_SIGNS]


@pytest.mark.parametrize(
    ("task", "damage"), CASES, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_the_grades_fall_with_the_strength(task: str, damage: Damage) -> None:
    prompts = tiny_prompts(f"tiny:{task}:validation:{COUNT}")
    clean = [world.render(p.fields["scene"], numpy_rng(1, "picture", i)) for i, p in enumerate(prompts)]
    grades = []
    for strength in STRENGTHS:
        spoilt = [damage(image, strength, numpy_rng(2, "damage", i)) for i, image in enumerate(clean)]
        images = [Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8)) for pixels in spoilt]
        found = TinyJudge()(images, prompts)
        grades.append([found[axis].mean() for axis in AXES])
    table = np.array(grades)
    assert table[0].min() > 4.7, table
    overall = table.mean(1)
    assert (np.diff(overall) < 0.08).all(), table  # where little is left to spoil, it may waver
    assert overall[-1] < overall[0] - 0.3, table
    assert (table.max(0) <= table[0] + 0.1).all(), table
