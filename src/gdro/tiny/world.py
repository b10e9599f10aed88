"""The tiny world: scenes of a wall, a sign with a word and colored shapes; their captions and their images.

A scene is what a prompt asks for, a JSON-able dict:
`{"wall": str, "word": str | None, "objects": [{"shape", "color" | None, "count"}], "position": str | None}`.
Like real captions, a caption omits what the scene leaves open (a color that is None is random in the image). Images are
64 x 32 RGB; every image is a function of (scene, generator).
"""

import hashlib
from collections.abc import Collection, Iterator
from functools import cache
from importlib.util import find_spec
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 64, 32

WALLS = {
    "gray": (150, 150, 150),
    "cream": (235, 220, 180),
    "teal": (30, 120, 120),
    "navy": (30, 40, 95),
    "olive": (110, 110, 45),
    "brown": (110, 65, 40),
}
COLORS = {
    "red": (215, 35, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 230, 50),
    "green": (40, 175, 65),
    "blue": (45, 95, 235),
    "purple": (140, 50, 190),
    "pink": (250, 130, 195),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
COUNTS = {2: "two", 3: "three", 4: "four"}
POSITIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

PLATE, INK, FRAME = (245, 243, 235), (20, 20, 25), (45, 40, 40)
SHAPE_SIZE = 11
PITCH, PLATE_HEIGHT, GLYPH_HEIGHT = 13, 17, 11  # a letter's cell width, the sign's height, a letter's height
BASEBOARD, PANEL = 3, 8  # height of the strip along the floor; distance of the wall's vertical grooves

# I and O are left out: the recognizer reads them as 1 and 0 no matter how they are drawn.
CONSONANTS, VOWELS = "BCDFGHKLMNPRSTWXZ", "AEUY"
ALPHABET = "".join(sorted(CONSONANTS + VOWELS))
PATTERNS = ("CVC", "CVCV", "CVCC", "CCVC")  # 1,156 + 4,624 + 19,652 + 19,652 words
SPLITS = ("train", "validation", "test")


def word_split(word: str) -> str:
    """The split that a word permanently belongs to: 8 of 10 words train, 1 validation, 1 test."""
    digit = hashlib.sha256(word.encode()).digest()[0] % 10
    return {8: "validation", 9: "test"}.get(digit, "train")


def random_word(rng: np.random.Generator, split: str) -> str:
    """A random pronounceable word of the split, in capital letters."""
    while True:
        pattern = PATTERNS[rng.choice(4, p=(0.1, 0.3, 0.3, 0.3))]
        word = "".join(str(rng.choice(list(CONSONANTS if kind == "C" else VOWELS))) for kind in pattern)
        if word_split(word) == split:
            return word


def _pick(rng: np.random.Generator, values: Collection[str], count: int) -> list[str]:
    names = list(values)
    return [names[i] for i in rng.choice(len(names), count, replace=False)]


def random_sign_scene(rng: np.random.Generator, split: str, *, objects: bool) -> dict[str, Any]:
    """A wall and a sign; with `objects` also one to three colored shapes of one kind below it."""
    scene: dict[str, Any] = {
        "wall": _pick(rng, WALLS, 1)[0],
        "word": random_word(rng, split),
        "objects": [],
        "position": None,
    }
    if objects:
        scene["objects"] = [
            {"shape": _pick(rng, SHAPES, 1)[0], "color": _pick(rng, COLORS, 1)[0], "count": int(rng.integers(1, 4))}
        ]
    return scene


def random_shape_scene(rng: np.random.Generator, tag: str) -> dict[str, Any]:
    """A wall and shapes, of one of GenEval's six kinds."""
    scene: dict[str, Any] = {"wall": _pick(rng, WALLS, 1)[0], "word": None, "objects": [], "position": None}
    shapes = _pick(rng, SHAPES, 2)
    colors = _pick(rng, COLORS, 2)
    if tag in ("single_object", "colors", "counting"):
        scene["objects"] = [{"shape": shapes[0], "color": colors[0] if tag == "colors" else None, "count": 1}]
        if tag == "counting":
            scene["objects"][0]["count"] = int(rng.integers(2, 5))
    else:
        scene["objects"] = [
            {"shape": s, "color": c if tag == "color_attr" else None, "count": 1}
            for s, c in zip(shapes, colors, strict=True)
        ]
        if tag == "position":
            scene["position"] = _pick(rng, POSITIONS, 1)[0]
    return scene


def shape_scenes() -> Iterator[dict[str, Any]]:
    """Every scene that `random_shape_scene` can give."""
    for wall, one, other in product(WALLS, SHAPES, SHAPES):
        plain = {"wall": wall, "word": None, "position": None}
        first = {"shape": one, "color": None, "count": 1}
        if one == other:
            yield from ({**plain, "objects": [{**first, "count": count}]} for count in (1, 2, 3, 4))
            yield from ({**plain, "objects": [{**first, "color": color}]} for color in COLORS)
            continue
        pair = [first, {**first, "shape": other}]
        yield from ({**plain, "objects": pair, "position": position} for position in (None, *POSITIONS))
        for colors in permutations(COLORS, 2):
            yield {**plain, "objects": [{**item, "color": c} for item, c in zip(pair, colors, strict=True)]}


def random_scene(rng: np.random.Generator, mixture: tuple[float, float] = (0.4, 0.2)) -> dict[str, Any]:
    """One scene of the pre-training mixture: the shares of signs and of signs with shapes; the rest are shapes.

    Uses only words of the train split.
    """
    kind = rng.random()
    if kind < mixture[0]:
        return random_sign_scene(rng, "train", objects=False)
    if kind < sum(mixture):
        return random_sign_scene(rng, "train", objects=True)
    return random_shape_scene(rng, str(rng.choice(TAGS)))


def with_slips(
    scene: dict[str, Any], rng: np.random.Generator, share: float, shape_share: float = 0.0
) -> dict[str, Any]:
    """The scene as a careless painter would draw it.

    Each letter is wrong with probability `share`, each named color with a third of that. With probability `shape_share`
    each, these are wrong: a kind of shape, a named color, a count (by one), the position (reversed).
    """
    slipped = dict(scene)
    if scene["word"]:
        letters = [str(rng.choice(list(ALPHABET))) if rng.random() < share else c for c in scene["word"]]
        slipped["word"] = "".join(letters)
    slipped["objects"] = [
        {**item, "color": _pick(rng, COLORS, 1)[0]} if item["color"] and rng.random() < share / 3 else item
        for item in scene["objects"]
    ]
    if shape_share:
        slipped["objects"] = [_slip(item, rng, shape_share) for item in slipped["objects"]]
        if scene["position"] and rng.random() < shape_share:
            slipped["position"] = OPPOSITE[scene["position"]]
    return slipped


def _slip(item: dict[str, Any], rng: np.random.Generator, share: float) -> dict[str, Any]:
    slipped = dict(item)
    if rng.random() < share:
        slipped["shape"] = _pick(rng, SHAPES, 1)[0]
    if item["color"] and rng.random() < share:
        slipped["color"] = _pick(rng, COLORS, 1)[0]
    if item["count"] > 1 and rng.random() < share:
        slipped["count"] = min(4, max(1, item["count"] + (1 if rng.random() < 0.5 else -1)))
    return slipped


def _noun(item: dict[str, Any]) -> str:
    color = f"{item['color']} " if item["color"] else ""
    if item["count"] == 1:
        return f"{'an' if color.startswith('o') else 'a'} {color}{item['shape']}"
    return f"{COUNTS[item['count']]} {color}{PLURALS[item['shape']]}"


def caption(scene: dict[str, Any]) -> str:
    """The scene in plain English, the word in double quotes."""
    article = "an" if scene["wall"] == "olive" else "a"
    wall = f"{article} {scene['wall']} wall"
    nouns = [_noun(item) for item in scene["objects"]]
    if scene["word"]:
        return f'{wall} with a sign that says "{scene["word"]}"' + "".join(f" and {noun}" for noun in nouns)
    joint = f" {scene['position']} " if scene["position"] else " and "
    return f"{joint.join(nouns)} on {wall}"


@cache
def shape_mask(shape: str, size: int = SHAPE_SIZE) -> np.ndarray:
    """(size, size) float32 coverage in [0, 1], anti-aliased."""
    scale, n = 8, size * 8
    image = Image.new("L", (n, n))
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
    elif shape == "square":
        draw.rectangle((scale // 2, scale // 2, n - 1 - scale // 2, n - 1 - scale // 2), fill=255)
    elif shape == "triangle":
        draw.polygon([(n / 2, 0), (0, n - 1), (n - 1, n - 1)], fill=255)
    else:
        arm = n // 3
        draw.rectangle((arm, 0, n - 1 - arm, n - 1), fill=255)
        draw.rectangle((0, arm, n - 1, n - 1 - arm), fill=255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32) / 255


@cache
def glyph(letter: str) -> np.ndarray:
    """(h, w) float32 coverage of a bold capital letter."""
    spec = find_spec("matplotlib")  # its folder has the font; importing it would take half a second
    assert spec is not None
    assert spec.origin is not None
    font = ImageFont.truetype(str(Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSans-Bold.ttf"), 15)
    left, top, right, bottom = (int(v) for v in font.getbbox(letter))
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), letter, fill=255, font=font)
    return np.asarray(image, np.float32) / 255


def blend(canvas: np.ndarray, mask: np.ndarray, top: int, left: int, color: tuple[int, int, int]) -> None:
    region = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    alpha = mask[: region.shape[0], : region.shape[1], None]
    region += alpha * (np.asarray(color, np.float32) - region)


def draw_sign(canvas: np.ndarray, word: str, top: int, left: int) -> None:
    width = PITCH * len(word) + 3
    canvas[top - 1 : top + PLATE_HEIGHT + 1, left - 1 : left + width + 1] = FRAME
    canvas[top : top + PLATE_HEIGHT, left : left + width] = PLATE
    for i, letter in enumerate(word):
        mask = glyph(letter)
        x = left + 2 + PITCH * i + (PITCH - mask.shape[1]) // 2
        blend(canvas, mask, top + (PLATE_HEIGHT - mask.shape[0]) // 2, x, INK)


def draw_wall(wall: str) -> np.ndarray:
    """(32, 64, 3) float32: the wall with its vertical grooves and darker baseboard."""
    canvas = np.empty((HEIGHT, WIDTH, 3), np.float32)
    color = np.asarray(WALLS[wall], np.float32)
    canvas[:] = color
    canvas[:, PANEL - 1 :: PANEL] = color * 0.85
    canvas[HEIGHT - BASEBOARD :] = color * 0.55
    return canvas


def _slots(scene: dict[str, Any], count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(top, left) of each shape, in the order of the scene's objects; 16-pixel slots, 4 across and 2 down."""

    def place(row: int, column: int) -> tuple[int, int]:
        return row * 15 + 1 + int(rng.integers(0, 4)), column * 16 + int(rng.integers(0, 5))

    if scene["word"]:
        return [(HEIGHT - SHAPE_SIZE, place(0, int(c))[1]) for c in sorted(rng.choice(4, count, replace=False))]
    if scene["position"] in ("left of", "right of"):
        row = int(rng.integers(0, 2))
        columns = sorted(int(c) for c in rng.choice(4, 2, replace=False))
        pair = [place(row, c) for c in columns]
        return pair if scene["position"] == "left of" else pair[::-1]
    if scene["position"]:
        column = int(rng.integers(0, 4))
        pair = [place(row, column) for row in (0, 1)]
        return pair if scene["position"] == "above" else pair[::-1]
    if count > 1:
        row = int(rng.integers(0, 2))
        return [place(row, int(c)) for c in sorted(rng.choice(4, count, replace=False))]
    return [place(int(rng.integers(0, 2)), int(rng.integers(0, 4)))]


def render(scene: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """The image of a scene: (32, 64, 3) uint8. What the scene leaves open is drawn from `rng`."""
    canvas = draw_wall(scene["wall"])
    if scene["word"]:
        top = 2 if scene["objects"] else int(rng.integers(4, 8))
        left = 2 + int(rng.integers(0, 3)) + (PITCH // 2 if len(scene["word"]) == 3 else 0)
        draw_sign(canvas, scene["word"], top, left)
    items = [item for item in scene["objects"] for _ in range(item["count"])]
    spare = iter(_pick(rng, COLORS, len(COLORS)))
    colors = {id(item): item["color"] or next(spare) for item in scene["objects"]}
    for item, (top, left) in zip(items, _slots(scene, len(items), rng), strict=True):
        blend(canvas, shape_mask(item["shape"]), top, left, COLORS[colors[id(item)]])
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
