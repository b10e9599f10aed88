"""Which prompts the report shows, and their images as data URIs."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from gdro.common.images import to_rgb
from gdro.common.rng import numpy_rng

SHOWN = 320  # longest side of an embedded image, in pixels; larger ones are downscaled and stored as JPEG
PIXEL_ART = 160  # images up to this size are embedded as they are (PNG) and enlarged without smoothing


def choose_prompts(base: np.ndarray, tuned: np.ndarray, *, seed: int) -> list[tuple[str, list[int]]]:
    """(title, prompt indices) from per-prompt mean rewards (P,): random, most improved and most worsened prompts.

    The random ones are drawn from all prompts without looking at rewards; only they are representative.
    """
    gain = tuned - base
    order = np.argsort(-gain, kind="stable")
    order = order[np.isfinite(gain[order])]
    drawn = numpy_rng(seed, "report prompts").permutation(len(gain))[:6]
    return [
        ("Drawn at random: representative", [int(i) for i in drawn]),
        ("The most improved: the best cases", [int(i) for i in order[:3] if gain[i] > 0]),
        ("The most worsened: the worst cases", [int(i) for i in order[::-1][:3] if gain[i] < 0]),
    ]


def choose_groups(rewards: dict[str, np.ndarray], *, seed: int, count: int = 3) -> list[str]:
    """`count` group ids at random among those whose rewards differ."""
    spread = sorted(group for group, values in rewards.items() if len(np.unique(values[np.isfinite(values)])) > 1)
    return [spread[i] for i in numpy_rng(seed, "report groups").permutation(len(spread))[:count]]


def figure(image: Image.Image, reward: float, evidence: dict[str, Any], alt: str) -> dict[str, Any]:
    """One image of the page: `uri`, `width`, `height`, `alt`, `reward`, and in `text` what was recognized: words or
    GenEval's objects (None: the reward recognizes nothing)."""
    image = to_rgb(image)
    buffer = io.BytesIO()
    if is_pixel_art(image):
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
        image.save(buffer, format="JPEG", quality=88)
        kind = "jpeg"
    text = evidence.get("text")
    if isinstance(objects := evidence.get("detections"), list):
        text = ", ".join(" ".join(filter(None, (found["color"], found["class"]))) for found in objects)
    return {
        "uri": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "width": image.width,
        "height": image.height,
        "alt": alt,
        "reward": float(reward) if np.isfinite(reward) else None,
        "text": text if isinstance(text, str) else None,
        "mark": "",
    }


def is_pixel_art(image: Image.Image) -> bool:
    """Whether the image is small enough to be shown enlarged without smoothing."""
    return max(image.size) <= PIXEL_ART


def mark_ends(figures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures by descending reward, the first marked best and the last worst; those without a reward come last."""
    ordered = sorted((f for f in figures if f["reward"] is not None), key=lambda f: -f["reward"])
    ordered[0]["mark"], ordered[-1]["mark"] = "mark", "low"
    return [*ordered, *(f for f in figures if f["reward"] is None)]
