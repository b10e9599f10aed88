"""Whatever a file holds becomes the pixels a viewer shows, or one line; and nothing else opens images."""

import ast
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageCms

import gdro
from gdro.common.errors import UserError
from gdro.common.images import MAX_PIXELS, open_image, path_inside, to_rgb

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(source: bytes | Path) -> np.ndarray:
    image = open_image(source, "it")
    assert image.mode == "RGB"
    assert not image.info
    return np.asarray(image)


def png(bits: int, kind: int, row: bytes, width: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one row, chunk by chunk."""
    head = (b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0))
    parts = [head, *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    return b"\x89PNG\r\n\x1a\n" + body


def test_transparent_parts_are_white() -> None:
    """Colors under alpha 0 do not show, half of black is gray; RGBA, gray with alpha, palette and color key alike."""
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [[255, 0, 0, 0], [0, 0, 0, 127], [0, 0, 255, 255]]
    shown = [[[255, 255, 255], [128, 128, 128], [0, 0, 255]]]
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert pixels(encoded(Image.fromarray(rgba), kind, **options)).tolist() == shown
    gray = Image.fromarray(np.array([[[0, 0], [0, 127], [9, 255]]], np.uint8))
    assert gray.mode == "LA"
    assert pixels(encoded(gray))[0, :, 0].tolist() == [255, 128, 9]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(palette, transparency=b"\0\xff"))[0].tolist() == [[255, 255, 255], [0, 0, 200]]
    assert pixels(encoded(Image.fromarray(RAMP), transparency=7))[0, 6:9, 0].tolist() == [6, 255, 8]
    for deep in (png(16, 0, b"\xff\xff\x03\xe8", 2, (b"tRNS", b"\x03\xe8")), png(2, 0, b"\x1b", 4, (b"tRNS", b"\0\1"))):
        with pytest.raises(UserError, match=r"^it has a transparent color in pixels of"):
            open_image(deep, "it")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_to_8(kind: str) -> None:
    """Mean 127.5 stays; clipping made it 251. Either order of bytes."""
    deep = RAMP.astype(np.uint16) * 257
    assert np.array_equal(pixels(encoded(Image.fromarray(deep), kind))[..., 1], RAMP)
    big = Image.frombytes("I;16B", (16, 16), deep.astype(">u2").tobytes())
    assert np.array_equal(pixels(encoded(big, kind))[..., 1], RAMP)
    assert np.array_equal(np.asarray(to_rgb(big))[..., 1], RAMP)


def test_depths_that_nothing_explains_are_refused() -> None:
    for mode, kind in (("F", "floats"), ("I", "integers")):
        with pytest.raises(UserError, match=rf"^it .*its pixels are 32-bit {kind}, with no defined white"):
            open_image(encoded(Image.new(mode, (4, 4), 1), "TIFF"), "it")
    inverted = Image.fromarray(RAMP.astype(np.uint16))
    with pytest.raises(UserError, match=r"^it is a gray TIFF with white as 0"):
        open_image(encoded(inverted, "TIFF", tiffinfo={262: 0}), "it")


def test_other_kinds_of_pixels() -> None:
    color = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for kind in ("PNG", "TIFF", "BMP"):
        assert np.array_equal(pixels(encoded(color, kind)), np.asarray(color))
    assert np.array_equal(pixels(png(16, 2, bytes(range(12)), 2)), [[[0, 2, 4], [6, 8, 10]]])  # the high bytes
    assert pixels(encoded(Image.fromarray(RAMP > 127)))[:, 0, 0].tolist() == [0] * 8 + [255] * 8
    for image in (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), Image.new("YCbCr", (8, 8), (76, 85, 255))):
        packed = encoded(image, "TIFF", compression="tiff_lzw")  # Pillow below 13 writes unpacked YCbCr wrongly
        assert np.abs(pixels(packed).astype(int) - [254, 0, 0]).max() <= 1
    assert np.abs(pixels(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")) - [254, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(kind: str, orientation: int) -> None:
    """The brightest corner is where EXIF says that the first pixel belongs."""
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8] = 255
    exif = Image.Exif()
    exif[274] = orientation
    image = open_image(encoded(Image.fromarray(stored), kind, exif=exif), "it")
    assert image.size == ((32, 16) if orientation < 5 else (16, 32))
    bright = np.asarray(image)[..., 1] > 127
    corners = [bright[y, x] for y, x in ((1, 1), (1, -2), (-2, -2), (-2, 1))]
    assert np.flatnonzero(corners).tolist() == [{1: 0, 2: 1, 3: 2, 4: 3, 5: 0, 6: 1, 7: 2, 8: 3}[orientation]]


def test_a_color_profile_is_applied() -> None:
    """sRGB's own and one of another kind of color change nothing; a linear one brightens the middle, gray or not."""
    from PIL.ImageCms import ImageCmsProfile

    image = Image.new("RGB", (4, 4), (200, 100, 50))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert pixels(encoded(image, icc_profile=srgb))[0, 0].tolist() == [200, 100, 50]
    lab = ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert pixels(encoded(image, icc_profile=lab))[0, 0].tolist() == [200, 100, 50]
    linear = _linear(srgb)
    expected = [255 * (1.055 * (v / 255) ** (1 / 2.4) - 0.055) for v in (200, 100, 50)]
    assert np.abs(pixels(encoded(image, icc_profile=linear))[0, 0] - expected).max() < 2
    gray = pixels(encoded(Image.new("L", (4, 4), 100), icc_profile=linear))[0, 0]
    assert np.abs(gray - expected[1]).max() < 2
    with pytest.raises(UserError, match=r"^it is damaged"):
        open_image(encoded(image, icc_profile=b"x" * 200), "it")


def _linear(srgb: bytes) -> bytes:
    """The profile with its curves replaced by gamma 1, and another name."""
    profile = bytearray(srgb)
    for place in range(struct.unpack(">I", profile[128:132])[0]):
        tag, offset, size = struct.unpack(">4sII", profile[132 + 12 * place : 144 + 12 * place])
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            profile[offset : offset + size] = (b"curv" + bytes(8)).ljust(size, b"\0")
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "line".encode("utf-16-be")).replace(b"sRGB", b"line")


def test_several_pictures_in_a_file_are_refused() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    for kind in ("PNG", "WEBP", "TIFF"):
        with pytest.raises(UserError, match=r"^it has 3 frames or pages; expected a single image$"):
            open_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), "it")
    camera = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])  # a JPEG with previews
    assert np.abs(pixels(camera)[0, 0] - np.array([254, 0, 0])).max() <= 3


def test_what_is_no_whole_image_is_one_line(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    bad = [b"", b"no image", png(8, 0, b"\0", 1)[:-30], png(8, 9, b"\0", 1)]
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP"):
        whole = encoded(noise, kind)
        bad += [whole[: len(whole) // 2], whole[:30]]
    flipped = bytearray(encoded(noise))
    flipped[500] ^= 1
    for data in (*bad, bytes(flipped)):
        with pytest.raises(UserError, match=r"^it is (not an image|damaged)[^\n]*$"):
            open_image(data, "it")

    side = int(MAX_PIXELS**0.5)
    bomb = png(1, 0, b"", side, (b"IHDR", struct.pack(">IIBBBBB", side, side + 1, 1, 0, 0, 0, 0)))
    with pytest.raises(UserError, match=rf"^it is {side}x{side + 1}; expected at most 67,108,864 pixels$"):
        open_image(bomb, "it")
    vast = png(1, 0, b"", 1, (b"IHDR", struct.pack(">IIBBBBB", 2**30, 2**30, 1, 0, 0, 0, 0)))
    with pytest.raises(UserError, match=r"^it is .*pixels[^\n]*$"):
        open_image(vast, "it")

    for path in (tmp_path / "none.png", tmp_path, tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(UserError, match=r"^it (not found|is damaged or of an unsupported kind)"):
            open_image(path, "it")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"^it not found"):
        open_image(tmp_path / "pipe.png", "it")


def test_no_file_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EPS is drawn by Ghostscript; named a.png, it must not get there."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: started.append(args))
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.new("RGB", (8, 8)), "EPS"))
    with pytest.raises(UserError, match=r"^a\.png is not an image; expected one of PNG, JPEG"):
        open_image(path, "a.png")
    assert not started


def test_names_stay_inside_the_folder_and_links_may_lead_out(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "1"
    blob.parent.mkdir()
    blob.write_bytes(encoded(Image.new("RGB", (4, 4), "red")))
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "a.png").symlink_to(blob)
    path = path_inside(folder, "x/../a.png")
    assert path == folder / "a.png"
    assert pixels(path)[0, 0].tolist() == [255, 0, 0]
    for name in ("../blobs/1", "x/../../blobs/1", str(blob), ".."):
        assert path_inside(folder, name) is None


def test_images_are_opened_in_one_place_only() -> None:
    """No other module of gdro calls PIL's open, by whatever name it is imported."""
    for path in Path(gdro.__file__).parent.rglob("*.py"):
        if path.name == "images.py" and path.parent.name == "common":
            continue
        names = {"PIL.Image"}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "PIL":
                names |= {alias.asname or alias.name for alias in node.names if alias.name in ("Image", "ImageFile")}
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("PIL."):
                assert not {alias.name for alias in node.names} & {"open", "*"}, path
            if isinstance(node, ast.Import):
                names |= {alias.asname for alias in node.names if alias.name == "PIL.Image" and alias.asname}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("open", "Parser"):
                assert ast.unparse(node.value) not in names, f"{path}:{node.lineno} opens an image by itself"
