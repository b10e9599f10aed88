"""The ways in which an over-optimized model spoils pictures, at growing strength: the judge must see each of them.

The mean of its axes falls with the strength, and no axis is taken in by any.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from gdro.common.rng import numpy_rng
from gdro.tiny import world
from gdro.tiny.judge import TinyJudge
from gdro.tiny.prompts import tiny_prompts
from gdro.tiny.vision import see

pytestmark = pytest.mark.slow

COUNT = 10
STRENGTHS = (0.0, 0.3, 0.6, 1.0)
AXES = ("alignment", "coherence", "style")
Damage = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def toward(image: np.ndarray, other: Any, strength: float, where: Any = True) -> np.ndarray:
    return np.where(where, image + (np.asarray(other, np.float64) - image) * strength, image)


def wall(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mask of the wall (32, 64, 1), color of its panels)."""
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


def resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Every shape at another size, about its center or as near to that as the picture's border allows."""
    out, seen = image.astype(np.float32), see(image)
    bare = world.draw_wall(seen.wall)
    for shape in seen.shapes:
        left, top, right, bottom = (*shape.box[:2], shape.box[0] + shape.box[2], shape.box[1] + shape.box[3])
        around = slice(max(0, top - 1), bottom + 1), slice(max(0, left - 1), right + 1)
        out[around] = bare[around]
    for shape in seen.shapes:
        mask = cv2.resize(world.shape_mask(shape.kind), (width, height), interpolation=cv2.INTER_AREA)
        left = min(max(0, round(shape.center[0] - width / 2)), world.WIDTH - width)
        top = min(max(0, round(shape.center[1] - height / 2)), world.HEIGHT - height)
        world.blend(out, mask, top, left, world.COLORS[shape.color])
    return out


def small_shapes(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return resized(image, side := round(11 - 6 * strength), side) if strength else image


def large_shapes(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return resized(image, side := round(11 + 11 * strength), side) if strength else image


def bars(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return resized(image, round(11 + 44 * strength), 10) if strength else image


def strays(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Free slots filled, up to all of them, with shapes of kinds that are not in the picture."""
    out, shapes = image.astype(np.float32), see(image).shapes
    slots = [(row * 15 + 3, column * 16 + 3) for row in (0, 1) for column in range(4)]
    free = [(t, x) for t, x in slots if all(abs(s.center[0] - x - 5) + abs(s.center[1] - t - 5) > 12 for s in shapes)]
    kinds = [kind for kind in world.SHAPES if kind not in {s.kind for s in shapes}]
    for i in rng.permutation(len(free))[: round(strength * len(free))]:
        world.blend(out, world.shape_mask(str(rng.choice(kinds))), *free[i], world.COLORS[_any_color(rng)])
    return out


def _any_color(rng: np.random.Generator) -> str:
    return str(rng.choice(list(world.COLORS)))


def other_wall(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    other = str(rng.choice([name for name in world.WALLS if name != see(image).wall]))
    return toward(image, world.draw_wall(other), strength, wall(image)[0])


def unasked_sign(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    out, letters = image.astype(np.float32), round(4 * strength)
    if letters:
        world.draw_sign(out, "BAKE"[:letters], 1 if np.mean([s.center[1] for s in see(image).shapes]) > 15 else 14, 3)
    return out


ANYWHERE: list[Damage] = [
    blur, grain, cloudy, posterised, flat_wall, no_baseboard, deep_grooves, washed_out_wall, dark_wall, oversaturated,
    faded, contrast, sharpened, ghosts, marks, stray_letters, other_wall,
]  # fmt: skip
OF_SIGNS: list[Damage] = [oversized, bold, faint, tinted, plate_grows, small_letters, repeated]
OF_SHAPES: list[Damage] = [small_shapes, large_shapes, bars, strays, unasked_sign]
CASES = [
    *(("ocr", damage) for damage in (*ANYWHERE, *OF_SIGNS)),
    *(("geneval", damage) for damage in (*ANYWHERE, *OF_SHAPES)),
]


@cache
def grades(task: str, damage: Damage) -> np.ndarray:
    """(strengths, axes): the means over COUNT pictures."""
    prompts = tiny_prompts(f"tiny:{task}:validation:{COUNT}")
    clean = [world.render(p.fields["scene"], numpy_rng(1, "picture", i)) for i, p in enumerate(prompts)]
    rows = []
    for strength in STRENGTHS:
        spoilt = [damage(image, strength, numpy_rng(2, "damage", i)) for i, image in enumerate(clean)]
        images = [Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8)) for pixels in spoilt]
        found = TinyJudge()(images, prompts)
        rows.append([found[axis].mean() for axis in AXES])
    return np.array(rows)


def name(value: Any) -> str:
    return value if isinstance(value, str) else value.__name__


@pytest.mark.parametrize(("task", "damage"), CASES, ids=name)
def test_the_grades_fall_with_the_strength(task: str, damage: Damage) -> None:
    table = grades(task, damage)
    assert table[0].min() > 4.7, table
    overall = table.mean(1)
    assert (np.diff(overall) < 0.08).all(), table  # where little is left to spoil, it may waver
    assert overall[-1] < overall[0] - 0.3, table
    assert (table.max(0) <= table[0] + 0.15).all(), table  # some walls hide a little of the style


@pytest.mark.parametrize("damage", [*OF_SHAPES, other_wall], ids=name)
def test_what_genevals_corrected_score_looks_at_falls_too(damage: Damage) -> None:
    """That score leaves alignment out, so these must show in coherence and style."""
    table = grades("geneval", damage)[:, 1:]
    assert (np.diff(table.mean(1)) < 0.08).all(), table
    assert table[-1].mean() < table[0].mean() - 0.3, table
