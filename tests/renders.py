"""Pictures with text to read: 64x32 walls with a sign, as the tiny world's, and larger ones."""

from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
WALLS = ["#c83c32", "#3ca050", "#4664c8", "#e6c83c", "#8c5a32", "#787878"]


def sign(word: str, variant: int = 0) -> Image.Image:
    """64x32: a white sign with a dark frame, letters on 13-pixel cells; odd variants have 9-pixel shapes below."""
    image = Image.new("RGB", (64, 32), WALLS[variant % len(WALLS)])
    draw = ImageDraw.Draw(image)
    left, top = 2 + variant % 4, variant % 3 if variant % 2 else 3 + variant % 8
    draw.rectangle((left, top, left + 55, top + 17), fill="#fafafa", outline="#141414")
    font = ImageFont.truetype(str(FONT), 14)
    for i, letter in enumerate(word):
        draw.text((left + 8.5 + 13 * i, top + 9), letter, font=font, fill="black", anchor="mm")
    if variant % 2:
        draw.ellipse((8, 22, 16, 30), fill=WALLS[(variant + 1) % len(WALLS)])
        draw.rectangle((30, 22, 38, 30), fill=WALLS[(variant + 2) % len(WALLS)])
    return image


def poster(lines: list[str], size: tuple[int, int]) -> Image.Image:
    """A large picture with lines of text."""
    image = Image.new("RGB", size, "#28508c")
    draw = ImageDraw.Draw(image)
    font = ImageFont.truetype(str(FONT), size[1] // 8)
    for i, line in enumerate(lines):
        draw.text((size[0] // 2, size[1] * (i + 1) // (len(lines) + 1)), line, font=font, fill="white", anchor="mm")
    return image
