"""The tiny world's judge: alignment, coherence and style, 1 to 5, from the image and the prompt's ground truth.

It explains an image as a scene of the world (a wall, at most one sign, shapes) by classical vision and grades

* alignment: whether wall, sign and shapes are those the prompt asked for, at the right size;
* coherence: how much of the image consists of well-formed things, no more than requested: marks, smears, malformed
  shapes, strays, and a sign or wall that was not requested lower it;
* style: the world's fine detail (grooves, baseboard), crisp edges, and absence of grain.

It never reads the word, so it cannot reward what the OCR reward rewards.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.tiny import world
from gdro.tiny.vision import DARK, VERSION, WALL, Seen, Shape, pixels_of, see

SIDES = (world.SHAPE_SIZE - 3, world.SHAPE_SIZE + 1)  # of a detected shape: soft edges hide up to three pixels


def _ratio(found: float, wanted: float, sharpness: float = 2.0) -> float:
    """1 if found equals wanted, decreasing with the logarithm of their ratio."""
    return float(np.exp(-sharpness * abs(np.log(max(found, 1e-3) / wanted))))


def _size_of_shape(shape: Shape) -> float:
    """1 at the world's size, decreasing with each side's ratio to it."""
    return float(np.prod([_ratio(side, float(np.clip(side, *SIDES))) for side in shape.box[2:]]))


def _form_of_shape(shape: Shape) -> float:
    """Whether it is a shape of this world, by outline and size (`see` compares outlines after stretching)."""
    return float(np.clip((shape.iou - 0.5) / 0.4, 0, 1)) * _size_of_shape(shape)


def alignment(seen: Seen, scene: dict[str, Any]) -> float:
    """Share of what the prompt asked for that is present, in [0, 1]."""
    wanted_wall = np.asarray(world.WALLS[scene["wall"]], np.float32)
    parts = [float(np.clip(1 - (np.linalg.norm(seen.wall_color - wanted_wall) - 10) / 70, 0, 1))]
    if scene["word"]:
        parts.append(_sign_score(seen, len(scene["word"])))
    wanted = 0
    for item in scene["objects"]:
        wanted += item["count"]
        same = [s for s in seen.shapes if s.kind == item["shape"]]
        exact = [s for s in same if item["color"] in (None, s.color)]
        counted = [max(0.0, 1 - abs(len(found) - item["count"]) / item["count"]) for found in (same, exact)]
        size = float(np.mean([_size_of_shape(s) for s in same])) if same else 0.0
        parts.append(size * sum(counted) / 2)
    if scene["position"]:
        parts.append(_position_score(seen, scene))
    strays = max(0, len(seen.shapes) - wanted) + (seen.sign is not None and not scene["word"])
    parts.append(1 / (1 + strays))
    return float(np.mean(parts))


def _sign_score(seen: Seen, letters: int) -> float:
    """1 if present, with the size, lettering height and ink of a sign with that many letters."""
    if not seen.sign:
        return 0.0
    left, top, right, bottom = seen.sign
    size = _ratio(right - left, world.PITCH * letters + 3) * _ratio(bottom - top, world.PLATE_HEIGHT)
    lettering = _ratio(max(seen.ink_height, 1), world.GLYPH_HEIGHT, 1.0) * _ratio(seen.ink, 0.2, 0.7)
    return (size + lettering) / 2


def _position_score(seen: Seen, scene: dict[str, Any]) -> float:
    first, second = ([s for s in seen.shapes if s.kind == item["shape"]] for item in scene["objects"])
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[scene["position"]]
    return float(any(sign * (a.center[axis] - b.center[axis]) > 4 for a in first for b in second))


def asked_for(seen: Seen, scene: dict[str, Any]) -> list[Shape]:
    """The detected shapes, at most as many as the scene has: first those of its kinds and colors, then the best formed.

    Others take the place of missing ones: a wrong kind or color only lowers alignment.
    """
    rest = sorted(seen.shapes, key=_form_of_shape, reverse=True)
    found: list[Shape] = []
    for item in scene["objects"]:
        same = sorted((s for s in rest if s.kind == item["shape"]), key=lambda s: item["color"] not in (None, s.color))
        found += same[: item["count"]]
        rest = [s for s in rest if s not in found]
    return found + rest[: sum(item["count"] for item in scene["objects"]) - len(found)]


def explain(image: np.ndarray, seen: Seen, shapes: Sequence[Shape], scene: dict[str, Any]) -> np.ndarray:
    """(32, 64, 3) float32: the image if it were exactly these shapes and the detected sign, on the requested wall.

    Without the sign if none was requested.
    """
    canvas = world.draw_wall(scene["wall"])
    for shape in shapes:
        left, top, width, height = shape.box
        mask = cv2.resize(world.shape_mask(shape.kind), (width, height), interpolation=cv2.INTER_LINEAR)[:, :, None]
        region = canvas[top : top + height, left : left + width]
        region += mask * (np.asarray(world.COLORS[shape.color], np.float32) - region)
    if seen.sign and scene["word"]:
        left, top, right, bottom = seen.sign
        canvas[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = world.FRAME
        plate = np.asarray(world.PLATE, np.float32)
        stroke = np.asarray(world.INK, np.float32) - plate
        coverage = np.clip((image[top:bottom, left:right] - plate) @ stroke / (stroke @ stroke), 0, 1)
        # half-covered pixels belong only at the edge of solid strokes: faint lettering is not explained
        edge = cv2.dilate((coverage > 0.75).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        canvas[top:bottom, left:right] = plate + np.where(edge, coverage, coverage > 0.5)[:, :, None] * stroke
    return canvas


def coherence(image: np.ndarray, seen: Seen, scene: dict[str, Any]) -> float:
    """How well the image is explained, in [0, 1]: the wall (half), the sign and the shapes, if any.

    Missing things cost nothing; things nobody asked for count as part of the wall and spoil it. Ignores soft edges one
    pixel wide.
    """
    shapes = asked_for(seen, scene)
    error = np.sqrt(((image - explain(image, seen, shapes, scene)) ** 2).mean(-1))
    unexplained = np.clip((error - 12) / 60, 0, 1)
    outside = np.ones(error.shape, bool)
    parts: list[tuple[float, float]] = []
    if seen.sign and scene["word"]:
        left, top, right, bottom = seen.sign
        outside[top:bottom, left:right] = False
        parts.append((0.25, _form_of_sign(seen) * np.exp(-4 * unexplained[~outside].mean())))
    if shapes:
        parts.append((0.25, float(np.mean([_form_of_shape(s) for s in shapes]))))
    parts.append((0.5, np.exp(-8 * unexplained[outside].mean()) if outside.any() else 0.0))
    return float(sum(w * value for w, value in parts) / sum(w for w, _ in parts))


def _form_of_sign(seen: Seen) -> float:
    """Whether it is a sign of this world, whatever it says: its height, lettering height and thinness of strokes."""
    assert seen.sign
    left, top, right, bottom = seen.sign
    dark = (seen.labels[top + 1 : bottom - 1, left + 1 : right - 1] == DARK).astype(np.uint8)
    solid = 0.0  # share of the strokes' inside: at most .08 in the world's letters, .2 and more in blots and bold ones
    if dark.any():
        core = cv2.erode(dark, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
        solid = float(core.sum() / dark.sum())
    thin = 1 - np.clip((solid - 0.1) / 0.4, 0, 1)
    return float(_ratio(bottom - top, world.PLATE_HEIGHT) * _ratio(seen.ink_height, world.GLYPH_HEIGHT) * thin)


def style(image: np.ndarray, seen: Seen) -> float:
    """Grooves and baseboard as deep as the world's, no grain on the wall, edges as crisp as the world's; in [0, 1]."""
    luma = image.mean(-1)
    wall = seen.labels == WALL
    groove, strip = np.zeros(wall.shape, bool), np.zeros(wall.shape, bool)
    groove[:, world.PANEL - 1 :: world.PANEL] = True
    strip[world.HEIGHT - world.BASEBOARD :] = True
    panel = wall & ~groove & ~strip
    if panel.sum() < 50:
        return 0.0
    level = float(np.median(luma[panel])) + 1e-3

    def depth(mask: np.ndarray, wanted: float) -> float:
        if mask.sum() < 8:
            return 0.0
        found = (1 - luma[mask].mean() / level) / wanted
        return float(np.clip(min(found, 2.3 - found), 0, 1))  # beyond 1.3 it is too deep

    # grain: neighbors on the same panel should be equal
    across = panel[:, 1:] & panel[:, :-1]
    grain = float(np.abs(np.diff(image, axis=1)).mean(-1)[across].mean()) if across.sum() > 30 else 30.0
    clean = float(np.exp(-max(0.0, grain - 2.0) / 6))
    return (
        depth(groove & wall & ~strip, 0.15) + depth(strip & wall, 0.45) + 2 * clean + 2 * _crispness(luma, seen)
    ) / 6


def _crispness(luma: np.ndarray, seen: Seen) -> float:
    """Steepest step across the detected outlines, divided by the step the world draws."""
    horizontal = np.abs(np.diff(luma, axis=1))
    if seen.sign:
        left, top, right, bottom = seen.sign
        inside = horizontal[top:bottom, left : right - 1]
        return float(np.clip(np.quantile(inside, 0.9) / 120, 0, 1)) if inside.size else 0.0
    scores = []
    for shape in seen.shapes:
        left, top, width, height = shape.box
        around = horizontal[top : top + height, max(0, left - 2) : left + width + 2]
        inked = float(np.mean(world.COLORS[shape.color]))
        contrast = abs(inked - float(seen.wall_color.mean()))
        if contrast > 25 and around.size:
            scores.append(float(np.clip(np.quantile(around.max(1), 0.5) / (0.6 * contrast), 0, 1)))
    return float(np.mean(scores)) if scores else 1.0


def tiny_judge() -> "TinyJudge":
    """The judge named "tiny"; it has no options."""
    return TinyJudge()


class TinyJudge:
    """Judge protocol over the functions above; needs prompts of the tiny world (a `scene` field)."""

    name = "tiny"
    version = f"3.{VERSION}"

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if not isinstance(prompt.fields.get("scene"), dict):
                raise UserError(
                    f'evaluate.judge: prompt "{prompt.id}" has no "scene"; "tiny" only judges prompts of the tiny world'
                )

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        rows = [self._grade(image, prompt.fields["scene"]) for image, prompt in zip(images, prompts, strict=True)]
        grades = 1 + 4 * np.asarray(rows, np.float64).reshape(-1, 3)
        return {axis: grades[:, i] for i, axis in enumerate(("alignment", "coherence", "style"))}

    @staticmethod
    def _grade(image: Image.Image, scene: dict[str, Any]) -> tuple[float, float, float]:
        pixels = pixels_of(image)
        seen = see(pixels)
        return alignment(seen, scene), coherence(pixels, seen, scene), style(pixels, seen)
