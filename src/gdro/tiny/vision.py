"""Classical vision for the tiny world's images: the wall, the sign and the shapes in them.

Used by the judge and, as GenEval's detector, by the reward; it finds letters but never reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
from PIL import Image

from gdro.rewards.geneval.detection import Detection, Record
from gdro.tiny import world

VERSION = "2"  # of `see`; part of the versions of the judge and the detector

COLOR_NAMES = tuple(world.COLORS)
PLATE, DARK, WALL = len(COLOR_NAMES), len(COLOR_NAMES) + 1, len(COLOR_NAMES) + 2
LONGEST = 2  # maximum ratio of length to width: the world's shapes are as wide as they are high
_PALETTE = np.array([*world.COLORS.values(), world.PLATE, world.INK], np.float32)


def _fit(mask: np.ndarray) -> np.ndarray:
    """A boolean mask cropped to its extent and stretched to the world's shape size."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    size = (world.SHAPE_SIZE, world.SHAPE_SIZE)
    return cv2.resize(cut, size, interpolation=cv2.INTER_LINEAR) > 0.5


_TEMPLATES = np.stack([_fit(world.shape_mask(s) > 0.5) for s in world.SHAPES])


@dataclass(frozen=True)
class Shape:
    """A shape detected in an image: kind, color, center (x, y), box (left, top, width, height), template IoU."""

    kind: str
    color: str
    center: tuple[float, float]
    box: tuple[int, int, int, int]
    iou: float


@dataclass(frozen=True)
class Seen:
    """An explained image: the wall it resembles most, the sign's box (left, top, right, bottom) and the shapes."""

    wall: str
    wall_color: np.ndarray  # (3,) median color of the wall between its grooves
    labels: np.ndarray  # (32, 64) palette index, plate, dark or wall
    sign: tuple[int, int, int, int] | None
    ink: float  # dark share of the sign
    ink_height: float  # pixels from the top to the bottom of the lettering
    shapes: list[Shape]


def pixels_of(image: Image.Image) -> np.ndarray:
    """(32, 64, 3) float32 in [0, 255]: the image at the world's size."""
    return np.asarray(image.convert("RGB").resize((world.WIDTH, world.HEIGHT), Image.Resampling.BOX), np.float32)


def _label(image: np.ndarray, wall: np.ndarray) -> np.ndarray:
    distance = ((image[:, :, None] - _PALETTE) ** 2).sum(-1)
    wall_distance = ((image - wall) ** 2).sum(-1)
    return np.concatenate([distance, wall_distance[:, :, None]], 2).argmin(2)


def see(image: np.ndarray) -> Seen:
    """Explain a (32, 64, 3) image in [0, 255]."""
    image = image.astype(np.float32)
    walls = {name: world.draw_wall(name) for name in world.WALLS}
    close = {n: (np.minimum(((image - w) ** 2).sum(-1), 3600)).mean() for n, w in walls.items()}
    wall = min(close, key=lambda n: close[n])
    labels = _label(image, walls[wall])
    flat = labels == WALL
    flat[:, world.PANEL - 1 :: world.PANEL] = False
    flat[world.HEIGHT - world.BASEBOARD :] = False
    wall_color = np.median(image[flat], 0) if flat.any() else image.reshape(-1, 3).mean(0)
    sign, ink, ink_height = _find_sign(labels)
    return Seen(wall, wall_color, labels, sign, ink, ink_height, _find_shapes(labels, sign))


def _components(mask: np.ndarray) -> list[tuple[int, int, int, int, int, np.ndarray]]:
    """(left, top, width, height, area, mask) of each 8-connected part."""
    count, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return [(*(int(v) for v in stats[i]), parts == i) for i in range(1, count)]


def _find_sign(labels: np.ndarray) -> tuple[tuple[int, int, int, int] | None, float, float]:
    # letters split the plate, so they are bridged before measuring its extent
    pad = 4  # room for the closing, which would stick to the image's border
    plate = np.pad((labels == PLATE).astype(np.uint8), pad)
    closed = cv2.morphologyEx(plate, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))[pad:-pad, pad:-pad]
    parts = [part for part in _components(closed) if part[4] >= 60]
    if not parts:
        return None, 0.0, 0.0
    left, top, width, height, _, _ = max(parts, key=lambda part: part[4])
    inside = labels[top : top + height, left : left + width] == DARK
    # the frame belongs to the plate's border, not to its lettering
    rows = np.flatnonzero(inside[1:-1, 1:-1].any(1))
    return (
        (left, top, left + width, top + height),
        float(inside.mean()),
        float(rows[-1] - rows[0] + 1) if len(rows) else 0.0,
    )


def _find_shapes(labels: np.ndarray, sign: tuple[int, int, int, int] | None) -> list[Shape]:
    outside = np.ones(labels.shape, bool)
    if sign:
        left, top, right, bottom = sign
        outside[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = False
    shapes = []
    for index, color in enumerate(COLOR_NAMES):
        for left, top, width, height, area, mask in _components((labels == index) & outside):
            if area < 18 or width < 5 or height < 5:
                continue
            if max(width, height) > LONGEST * min(width, height):  # a bar, whatever it resembles when stretched
                continue
            crop = _fit(mask)
            iou = (crop & _TEMPLATES).sum((1, 2)) / (crop | _TEMPLATES).sum((1, 2))
            best = int(iou.argmax())
            if iou[best] < 0.5:  # a smear, or the soft outline of another shape
                continue
            center = (left + (width - 1) / 2, top + (height - 1) / 2)
            shapes.append(Shape(world.SHAPES[best], color, center, (left, top, width, height), float(iou[best])))
    return shapes


class TinyDetector:
    """GenEval's detector for the tiny world: the shapes `see` finds, with their colors.

    Its score increases with the overlap (IoU) of a shape with its template: .3 at .5, the least that `see` calls a
    shape, .9 at .7, a definite shape, 1 at 1; so the evaluator's two thresholds have their usual meaning.
    """

    name: ClassVar[str] = "tiny"
    version: ClassVar[str] = VERSION
    parallel: ClassVar[bool] = True
    classes: ClassVar[Sequence[str]] = world.SHAPES
    colors: ClassVar[Sequence[str]] = COLOR_NAMES

    def __call__(self, images: Sequence[Image.Image], records: Sequence[Record]) -> list[list[Detection]]:
        return [self._detect(image) for image in images]

    @staticmethod
    def _detect(image: Image.Image) -> list[Detection]:
        across, down = image.width / world.WIDTH, image.height / world.HEIGHT
        found = []
        for shape in see(pixels_of(image)).shapes:
            left, top, width, height = shape.box
            box = (left * across, top * down, (left + width) * across, (top + height) * down)
            score = float(np.interp(shape.iou, (0.5, 0.7, 1), (0.3, 0.9, 1)))
            found.append(Detection(shape.kind, box, score, shape.color))
        return found
