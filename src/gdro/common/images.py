"""The one way to open an image: a file becomes the RGB pixels that a viewer shows, or a one-line error.

Only decoders of FORMATS are allowed, whatever the file's name: others start programs (EPS runs Ghostscript).
"""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from gdro.common.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
MAX_PIXELS = 1 << 26  # 8192 x 8192, and below what Pillow warns of
WIDE = ("I;16", "I;16L", "I;16B", "I;16N")  # modes of 16-bit gray
GRAY = ("1", "L", "LA", "La", *WIDE)


def open_image(source: bytes | Path, name: str) -> Image.Image:
    """Only the pixels: 8-bit RGB, upright by EXIF, in sRGB by the file's color profile, transparent parts on white.

    Raises UserError starting with `name` for a file that is not an image of FORMATS, is damaged, has more than
    MAX_PIXELS or several frames or pages (which one?), or holds floats or 32-bit integers (how bright is white?).
    """
    try:
        if isinstance(source, Path) and not source.is_file():
            raise UserError(f"{name} not found; expected an image file")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            _refuse(image, name)
            image.load()
            rgb = _in_srgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image; expected one of {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise all kinds of exceptions
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is damaged or of an unsupported kind ({reason})") from None
    rgb.info = {}
    return rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in memory as 8-bit RGB: transparent parts on white, 16-bit gray scaled. ValueError for other depths."""
    if image.mode in WIDE:
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        raise ValueError(f"its pixels are 32-bit {kind}, with no defined white; expected 8 or 16 bits")
    if image.has_transparency_data:
        colors = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")
    return image.convert("RGB")


def path_inside(folder: Path, name: str) -> Path | None:
    """`folder / name`, or None if the name leads out of the folder. The file may be a link to anywhere, as in Hub
    snapshots."""
    name = os.path.normpath(name)
    return None if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir else folder / name


def _refuse(image: Image.Image, name: str) -> None:
    """Raise UserError for images that would be read incorrectly."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{name} is {width}x{height}; expected at most {MAX_PIXELS:,} pixels")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's JPEG followed by previews
        raise UserError(f"{name} has {frames} frames or pages; expected a single image")
    tags = getattr(image, "tag_v2", {})
    bits, white_is_zero = tags.get(258, (16,))[0], tags.get(262) == 0
    if image.mode in WIDE and (bits != 16 or white_is_zero):
        found = "white as 0" if white_is_zero else f"{bits} bits a pixel"
        raise UserError(
            f"{name} is a gray TIFF with {found}, which is not supported; expected 8 or 16 bits, black as 0"
        )
    if isinstance(image, PngImageFile) and image.mode != "P" and "transparency" in image.info:
        depth = image.tile[0][3]  # the file's, unlike the mode
        if depth != image.mode:  # Pillow may compare the color before or after scaling the pixels
            raise UserError(
                f"{name} has a transparent color in pixels of {depth}; expected 8 bits, or an alpha channel"
            )


def _in_srgb(image: Image.Image) -> Image.Image:
    """RGB pixels converted by the image's color profile; unchanged without one, or if it is for another color model."""
    if "icc_profile" not in image.info:
        return to_rgb(image)
    profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    if "sRGB" in ImageCms.getProfileDescription(profile):
        return to_rgb(image)
    pixels = image if image.mode == "CMYK" else to_rgb(image)
    space = profile.profile.xcolor_space.strip()
    if space == "GRAY" and image.mode in GRAY:
        pixels = pixels.convert("L")
    if pixels.mode != {"GRAY": "L"}.get(space, space):
        return to_rgb(image)
    converted = ImageCms.profileToProfile(pixels, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # None only in place
    return converted
