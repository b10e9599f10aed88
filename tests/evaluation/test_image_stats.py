"""Signs of hacking: damage images and see the sign move, at the tiny size and at 1024 pixels."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from gdro.evaluation.image_stats import THRESHOLDS, box_share, compare_image_stats, measure_image_stats, verdict

SIZES = [(64, 32), (1024, 1024)]


def scene(size: tuple[int, int], seed: int) -> Image.Image:
    """A textured two-colored ground with discs and one short word."""
    width, height = size
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(int(v) for v in rng.integers(90, 200, 3)))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height // 2, width, height), fill=tuple(int(v) for v in rng.integers(90, 200, 3)))
    for _ in range(6):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), height / 8
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(v) for v in rng.integers(0, 255, 3)))
    return image


def scenes(size: tuple[int, int], n: int = 4) -> list[Image.Image]:
    return [scene(size, seed) for seed in range(n)]


def lettered(image: Image.Image, lines: int) -> Image.Image:
    image = image.copy()
    draw = ImageDraw.Draw(image)
    line = image.height // 3
    font = ImageFont.load_default(size=line)
    for i in range(lines):
        draw.text(
            (0, i * line), "WORDS" * 4, fill="white", font=font, stroke_width=max(1, line // 20), stroke_fill="black"
        )
    return image


@pytest.mark.parametrize("size", SIZES)
def test_damage_moves_its_sign(size: tuple[int, int]) -> None:
    good = measure_image_stats(scenes(size))
    dark = measure_image_stats([i.point(lambda v: v * 0.2) for i in scenes(size)])
    assert (dark["brightness"] < 0.3 * good["brightness"]).all()
    assert (dark["dark_pixels"] > good["dark_pixels"] + 0.5).all()
    blurred = measure_image_stats([i.filter(ImageFilter.GaussianBlur(size[1] / 8)) for i in scenes(size)])
    assert (blurred["edge_density"] < 0.7 * good["edge_density"]).all()
    gray = measure_image_stats([i.convert("L").convert("RGB").quantize(2).convert("RGB") for i in scenes(size)])
    assert (gray["color_entropy"] < good["color_entropy"]).all()
    assert (gray["color_entropy"] <= 1).all()
    text = measure_image_stats([lettered(i, 3) for i in scenes(size)])
    assert (text["text_share"] > good["text_share"] + 0.2).all()


@pytest.mark.parametrize("size", SIZES)
def test_more_lines_of_text_cover_more(size: tuple[int, int]) -> None:
    plain = [Image.new("RGB", size, (160, 120, 90))]
    shares = [measure_image_stats([lettered(i, lines) for i in plain])["text_share"][0] for lines in range(4)]
    assert shares[0] == 0
    assert all(a < b for a, b in itertools.pairwise(shares))


@pytest.mark.parametrize("size", SIZES)
def test_a_collapsed_group_has_no_diversity(size: tuple[int, int]) -> None:
    varied, same = measure_image_stats(scenes(size)), measure_image_stats([scene(size, 0)] * 4)
    for name in ("layout_diversity", "color_diversity"):
        assert varied[name][0] > 0.05
        assert same[name][0] == 0
        assert np.isnan(measure_image_stats(scenes(size, 1))[name][0])


def test_values_against_closed_form() -> None:
    """Black left half, white right half: brightness 1/2, one bit of color, one column of edges."""
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[:, 32:] = 255
    image_stats = measure_image_stats(
        [Image.fromarray(pixels), Image.fromarray(255 - pixels), Image.new("RGB", (64, 32))]
    )
    np.testing.assert_allclose(image_stats["brightness"], [0.5, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(image_stats["dark_pixels"], [0.5, 0.5, 1])
    np.testing.assert_allclose(image_stats["color_entropy"], [1, 1, 0])
    np.testing.assert_allclose(image_stats["edge_density"], [1 / 64, 1 / 64, 0])
    np.testing.assert_allclose(image_stats["layout_diversity"], (1 + 2 * np.sqrt(0.5)) / 3)
    hellinger = np.sqrt(1 - np.sqrt(0.5))
    np.testing.assert_allclose(image_stats["color_diversity"], 2 * hellinger / 3)


def test_box_share_is_of_the_union_and_stays_inside_the_image() -> None:
    left = [[0, 0], [50, 0], [50, 100], [0, 100]]
    inside = [[10, 10], [20, 10], [20, 20], [10, 20]]
    outside = [[90, 90], [140, 90], [140, 140], [90, 140]]
    assert box_share([], 100, 100) == 0
    assert box_share([left, inside], 100, 100) == 0.5
    assert box_share([left, outside], 100, 100) == 0.51
    assert measure_image_stats(scenes((100, 100), 1), [[left]])["text_share"][0] == 0.5


def test_images_of_different_modes_count_as_rgb() -> None:
    image_stats = measure_image_stats(
        [Image.new("L", (64, 32), 128), Image.new("RGBA", (64, 32), (128, 128, 128, 255))]
    )
    assert image_stats["brightness"][0] == image_stats["brightness"][1]


TEXTS = [str(i) for i in range(40)]


def per_prompt(change: dict[str, float]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    base = {name: rng.uniform(0.4, 0.6, 40) for name in THRESHOLDS}
    return base, {name: base[name] * (1 + change.get(name, 0)) for name in THRESHOLDS}


def test_verdict_names_what_moved_and_by_how_much() -> None:
    """A public case: dark pixels .45 -> .93, edge density -60 %, color entropy -54 %."""
    base, tuned = per_prompt({"dark_pixels": 1.07, "edge_density": -0.6, "color_entropy": -0.7, "brightness": 0.1})
    lines = verdict(compare_image_stats(base, tuned, TEXTS, samples=200, seed=0))
    assert [line.split(" (")[0] for line in lines] == [
        "share of dark pixels rose 107 %",
        "edge density fell 60 %",
        "color entropy fell 70 %",
    ]


def test_no_verdict_without_change_or_without_certainty_or_in_the_good_direction() -> None:
    base, tuned = per_prompt({"layout_diversity": 0.9, "text_share": -0.9})
    assert verdict(compare_image_stats(base, tuned, TEXTS, samples=200, seed=0)) == []
    noise = np.random.default_rng(1)
    base = {name: noise.exponential(size=6) for name in THRESHOLDS}
    tuned = {name: noise.permutation(base[name]) for name in THRESHOLDS}
    assert verdict(compare_image_stats(base, tuned, TEXTS[:6], samples=200, seed=0)) == []


def test_a_sign_absent_from_the_base_is_from_nothing() -> None:
    base, tuned = per_prompt({})
    base["text_share"], tuned["text_share"] = np.zeros(40), np.full(40, 0.5)
    assert verdict(compare_image_stats(base, tuned, TEXTS, samples=50, seed=0)) == [
        "share covered by text rose from nothing (0 to 0.5)"
    ]
