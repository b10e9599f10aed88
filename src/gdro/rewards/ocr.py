"""Reward of readable text (Flow-GRPO's OCR reward), with RapidOCR: the PaddleOCR models on ONNX Runtime.

Settings are those of the published reward's engine, PaddleOCR: the image is searched for text at its own size, its
sides rounded to multiples of 32 and its longer side at most 960 (small images so cost little, large ones lose little);
boxes are read from top to bottom and left to right; a box below .5 confidence is dropped. One departure: a line is
padded to 96 pixels at least instead of 320, which halves the time and misreads fewer short words. Every line is read
by itself: in batches ONNX Runtime is no faster on a core, and a score would depend on its neighbours' widths.
"""

import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version as installed
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from rapidfuzz.distance import Levenshtein

from gdro.errors import UserError
from gdro.files import fingerprint
from gdro.prompts import Prompt
from gdro.rewards.base import ImageFailure, Scores

ENGINE = {
    "Global.use_cls": False,
    "Global.text_score": 0.5,
    "Det.limit_side_len": 960,
    "Det.limit_type": "max",
    "Rec.rec_img_shape": [3, 48, 96],
    "Rec.rec_batch_num": 1,
}
_THREADS = {"EngineConfig.onnxruntime.intra_op_num_threads": 1, "EngineConfig.onnxruntime.inter_op_num_threads": 1}
_QUOTED = re.compile('["“”„‟＂]([^"“”„‟＂]*)["“”„‟＂]')


def target_text(prompt: str) -> str:
    """The text between the first pair of double quotes, straight or curly; UserError if there is none in them."""
    found = _QUOTED.search(prompt)
    if not found:
        raise UserError(f'prompt {prompt!r} has no text in double quotes; expected e.g. a sign that says "OPEN"')
    if not _plain(found[1]):
        raise UserError(f"prompt {prompt!r} has nothing between its first double quotes; expected the text to read")
    return found[1]


def ocr_score(recognised: str, target: str, *, strict: bool = False) -> float:
    """1 - min(d, n) / n in [0, 1]; d the edit distance of the texts without case and spaces, n the target's length.

    The published rule (Flow-GRPO) sets d = 0 if the target is found anywhere in the recognised text, so any junk
    around it is free; `strict` does not.
    """
    recognised, target = _plain(recognised), _plain(target)
    if not target:
        raise ValueError("the target is empty")
    if not strict and target in recognised:
        return 1.0
    return 1.0 - min(Levenshtein.distance(recognised, target), len(target)) / len(target)


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


@dataclass(frozen=True)
class OcrReward:
    """How much of the text its prompt asks for an image shows, by `ocr_score`.

    Evidence: `text` (boxes joined in reading order), `confidence` (mean over boxes, None without a box) and `lines`
    (text, confidence and box of four (x, y) corners of each). Uses OMP_NUM_THREADS threads, by default one a core.
    """

    strict: bool = False
    parallel: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "ocr_strict" if self.strict else "ocr"

    @property
    def version(self) -> str:
        """Rule and engine: the package pins its models by digest."""
        return fingerprint("rule 1", self.name, ENGINE, installed("rapidocr"))

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            try:
                target_text(prompt.text)
            except UserError as error:
                raise UserError(f'reward "{self.name}": prompt "{prompt.id}": {error}') from None

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        targets = [target_text(prompt.text) for prompt in prompts]
        if len(images) != len(targets):
            raise ValueError(f"{len(images)} images came with {len(targets)} prompts")
        threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
        with ThreadPoolExecutor(max(1, min(threads, len(images)))) as pool:
            evidence = list(pool.map(_read, range(len(images)), images))
        scores = [ocr_score(e["text"], t, strict=self.strict) for e, t in zip(evidence, targets, strict=True)]
        return Scores(np.asarray(scores, np.float64), evidence)


_idle: list[Any] = []
_lock = threading.Lock()


def _read(index: int, image: Image.Image) -> dict[str, Any]:
    """The text in an image. An engine is used by one thread at a time, and kept for the next one."""
    pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])  # the models were trained on BGR
    with _lock:
        engine = _idle.pop() if _idle else None
    try:
        engine = engine or _new_engine()
        found = engine(pixels)
    except Exception as error:
        cause = error.__cause__ or error  # RapidOCR's own message is a traceback
        raise ImageFailure(index, f"RapidOCR failed ({type(cause).__name__}: {cause})") from error
    with _lock:
        _idle.append(engine)
    texts, confidences = found.txts or (), [float(c) for c in found.scores or ()]
    boxes = [] if found.boxes is None else np.asarray(found.boxes).round(1).tolist()
    return {
        "text": "".join(texts),
        "confidence": float(np.mean(confidences)) if confidences else None,
        "lines": [list(line) for line in zip(texts, confidences, boxes, strict=True)],
    }


def _new_engine() -> Any:
    from rapidocr import RapidOCR  # slow to import

    return RapidOCR(params={"Global.log_level": "error", **ENGINE, **_THREADS})
