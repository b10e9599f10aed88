"""The reward's OCR engines, one image at a time: RapidOCR, and PaddleOCR as an extra.

Both use the settings of the published reward (Flow-GRPO on PaddleOCR 2): text is detected at the image's own size, with
sides rounded to multiples of 32 and the longer one at most 960 (so small images cost little and large ones lose
little); boxes are read top to bottom, left to right; boxes below .5 confidence are dropped; no angle classification, no
unwarping. RapidOCR differs in one way: lines are padded to at least 96 pixels instead of 320, which halves the time and
misreads fewer short words. It reads each line separately: batches are no faster with ONNX Runtime on one core, and
scores would depend on the neighbors' widths.
"""

import logging
import threading
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.images import to_rgb
from gdro.rewards.base import ImageFailure

EngineName = Literal["rapidocr", "paddleocr"]
NAMES: tuple[EngineName, ...] = get_args(EngineName)
Line = tuple[str, float, list[list[float]]]
"""Text, confidence in [0, 1], box as four (x, y) corners in pixels."""
Engine = Callable[[np.ndarray], list[Line]]
"""(height, width, 3) uint8 in BGR, which the models were trained on -> lines in reading order. One thread at a time."""

RAPIDOCR = {
    "Global.use_cls": False,
    "Global.text_score": 0.5,
    "Det.limit_side_len": 960,
    "Det.limit_type": "max",
    "Rec.rec_img_shape": [3, 48, 96],
    "Rec.rec_batch_num": 1,
}
PADDLEOCR = {
    "use_doc_orientation_classify": False,
    "use_doc_unwarping": False,
    "use_textline_orientation": False,
    "text_det_limit_side_len": 960,
    "text_det_limit_type": "max",
    "text_rec_score_thresh": 0.5,
}
PACKAGES = {"rapidocr": ("rapidocr",), "paddleocr": ("paddleocr", "paddlex", "paddlepaddle")}
INSTALL = {"rapidocr": "pip install rapidocr", "paddleocr": 'pip install "gdro[paddle]"'}


def identity(name: EngineName, lang: str | None = None) -> list[Any]:
    """What an engine's readings depend on: settings, and packages, which pin their models. UserError without them."""
    try:
        versions = [installed(package) for package in PACKAGES[name]]
    except PackageNotFoundError as error:
        raise UserError(f'OCR engine "{name}" needs {error.name}, not installed; expected `{INSTALL[name]}`') from None
    return [RAPIDOCR, *versions] if name == "rapidocr" else [PADDLEOCR, lang or "en", *versions]


def rapidocr() -> Engine:
    """RapidOCR: PaddleOCR's models on ONNX Runtime, included in its wheel. They read Chinese, English and Japanese."""
    from rapidocr import RapidOCR  # slow to import

    one = {"EngineConfig.onnxruntime.intra_op_num_threads": 1, "EngineConfig.onnxruntime.inter_op_num_threads": 1}
    engine = RapidOCR(params={"Global.log_level": "error", **RAPIDOCR, **one})

    def read(pixels: np.ndarray) -> list[Line]:
        found = engine(pixels)
        boxes = [] if found.boxes is None else np.asarray(found.boxes).round(1).tolist()
        return list(zip(found.txts or (), [float(c) for c in found.scores or ()], boxes, strict=True))

    return read


def paddleocr(**options: Any) -> Engine:
    """PaddleOCR 3 on one CPU thread; `options` are its constructor's. It downloads its models on first use."""
    from paddleocr import PaddleOCR  # type: ignore[import-not-found,import-untyped,unused-ignore]  # an extra

    logging.getLogger("paddlex").setLevel(logging.CRITICAL)  # anything important is also raised
    engine = PaddleOCR(**{"device": "cpu", "cpu_threads": 1, **PADDLEOCR, **options})

    def read(pixels: np.ndarray) -> list[Line]:
        (found,) = engine.predict(pixels)
        boxes = [np.asarray(box, np.float64).round(1).tolist() for box in found["rec_polys"]]
        return list(zip(found["rec_texts"], [float(c) for c in found["rec_scores"]], boxes, strict=True))

    return read


_idle: dict[tuple[EngineName, str | None], list[Engine]] = {}
_lock = threading.Lock()


def prepare(name: EngineName, lang: str | None = None) -> None:
    """Make sure the engine's models are here. Raises UserError if a package or its models are unavailable."""
    identity(name, lang)
    if name == "rapidocr" or _idle.get((name, lang)):
        return
    try:
        engine = _new(name, lang)
    except Exception as error:
        raise UserError(
            f'OCR engine "{name}", lang {lang or "en"}, cannot load ({_reason(error)}); expected a network at its '
            "first use, or ~/.paddlex/official_models copied from a machine that has it"
        ) from error
    with _lock:
        _idle.setdefault((name, lang), []).append(engine)


def read(index: int, image: Image.Image, name: EngineName = "rapidocr", lang: str | None = None) -> dict[str, Any]:
    """The text in an image: `text` (boxes joined in reading order), `confidence` (mean over boxes, None without one),
    `lines`. Raises ImageFailure for image `index` if the engine fails.

    An engine is used by one thread at a time and kept for the next.
    """
    pixels = np.ascontiguousarray(np.asarray(to_rgb(image))[:, :, ::-1])
    with _lock:
        idle = _idle.setdefault((name, lang), [])
        engine = idle.pop() if idle else None
    try:
        engine = engine or _new(name, lang)
        lines = engine(pixels)
    except Exception as error:
        raise ImageFailure(index, f"{name} failed ({_reason(error)})") from error
    with _lock:
        idle.append(engine)
    confidences = [confidence for _, confidence, _ in lines]
    return {
        "text": "".join(text for text, _, _ in lines),
        "confidence": float(np.mean(confidences)) if lines else None,
        "lines": [list(line) for line in lines],
    }


def _new(name: EngineName, lang: str | None) -> Engine:
    return rapidocr() if name == "rapidocr" else paddleocr(lang=lang or "en")


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error  # RapidOCR's own message is a traceback
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"
