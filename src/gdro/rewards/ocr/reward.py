"""Reward for readable text (Flow-GRPO's OCR reward, 2505.05470), with the engines of `gdro.rewards.ocr.engines`."""

import os
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image
from rapidfuzz.distance import Levenshtein

from gdro.common import environment
from gdro.common.errors import UserError
from gdro.common.files import fingerprint
from gdro.common.prompts import Prompt
from gdro.rewards.base import Scores
from gdro.rewards.ocr.engines import EngineName, identity, prepare, read

_DOUBLE = '"＂“”„‟'
_CLOSERS = {'"': '"＂', "＂": '"＂', "“": "”", "‟": "”", "„": "“”", "”": "”", "「": "」", "『": "』", "｢": "｣"}
_STRAIGHT = str.maketrans("‘’‚‛“”„‟", "''''" + '""""')


def target_of(prompt: Prompt) -> str:
    """The text to read: the record's `target` if any, else the prompt's quoted text (`quoted_text`). UserError if
    there is neither."""
    if "target" not in prompt.fields:
        text = quoted_text(prompt.text)
        if text is None:
            raise UserError(
                f'prompt {prompt.text!r} has no text in double quotes; expected e.g. a sign that says "OPEN", '
                'or the text in its "target"'
            )
        return text
    target = prompt.fields["target"]
    if not isinstance(target, str) or not _plain(target):
        raise UserError(f'prompt {prompt.text!r} has "target" {target!r}; expected the text to read')
    return target


def quoted_text(prompt: str) -> str | None:
    """The text between the first pair of double quotes; None without one. UserError if the marks are ambiguous: an odd
    number of them, one after a digit (inches), or a backslash that would begin the text.

    Straight marks pair as in the published rule, each with the next. Other marks may contain quotes of any kind:
    “ ”, „ “, 「 」, 『 』, ｢ ｣; those without a partner end at the next mark of any kind. A lone double quote is not a
    pair and is skipped.
    """
    marks = sum(mark in _DOUBLE for mark in prompt)
    for start, mark in enumerate(prompt):
        if mark not in _CLOSERS or (mark in _DOUBLE and marks == 1):
            continue
        end = _end(prompt, start, _CLOSERS[mark])
        if mark in _DOUBLE:
            before = prompt[start - 1 : start]
            if marks % 2:
                raise _ambiguous(prompt, f"{marks} double quotes, an odd number")
            if unicodedata.category(before or " ").startswith("N"):
                raise _ambiguous(prompt, f"a double quote after the digit {before}, as if for inches")
            if before == "\\":
                raise _ambiguous(prompt, "a backslash before its first double quote")
            if end is None:
                end = next((i for i in range(start + 1, len(prompt)) if prompt[i] in _DOUBLE), None)
        if end is None:
            continue
        if not _plain(prompt[start + 1 : end]):
            raise UserError(f"prompt {prompt!r} has nothing between its first double quotes; expected the text to read")
        return prompt[start + 1 : end]
    return None


def _ambiguous(prompt: str, what: str) -> UserError:
    return UserError(f'prompt {prompt!r} has {what}; expected one text in a pair of them, or the text in its "target"')


def _end(prompt: str, start: int, closers: str) -> int | None:
    """The index of the mark that closes the one at `start`, or None."""
    depth = 0
    for i in range(start, len(prompt)):
        if i > start and prompt[i] in closers:
            depth -= 1
        elif prompt[i] == prompt[start]:
            depth += 1
        if depth == 0:
            return i
    return None


def ocr_score(recognized: str, target: str, *, strict: bool = False, normalize: bool = False) -> float:
    """1 - min(d, n) / n in [0, 1]; d is the edit distance ignoring case and spaces, n the target's length.

    The published rule (Flow-GRPO) sets d = 0 if the target occurs anywhere in the recognized text, so junk around it
    is free; `strict` does not. `normalize` compares the texts after `normalized`; the published rule does not. Raises
    ValueError for an empty target.
    """
    if normalize:
        recognized, target = normalized(recognized), normalized(target)
    recognized, target = _plain(recognized), _plain(target)
    if not target:
        raise ValueError("the target is empty")
    if not strict and target in recognized:
        return 1.0
    return 1.0 - min(Levenshtein.distance(recognized, target), len(target)) / len(target)


def normalized(text: str) -> str:
    """Unicode NFKC (full-width letters, digits and punctuation become ASCII), with curly quotes made straight.

    OCR models return either form whatever the image shows: ’ may come back as ', ＯＰＥＮ as OPEN.
    """
    return unicodedata.normalize("NFKC", text).translate(_STRAIGHT)


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


def edit_distance(recognized: str, target: str) -> int:
    """Characters to change, ignoring case and spaces; 0 is an exact match."""
    return Levenshtein.distance(_plain(recognized), _plain(target))


@dataclass(frozen=True)
class OcrReward:
    """How much of its prompt's target text an image shows, by `ocr_score`.

    Evidence: `text` (boxes joined in reading order), `confidence` (mean over boxes, None without a box) and `lines`
    (text, confidence and box of four (x, y) corners of each). Uses OMP_NUM_THREADS threads, by default one per core.
    """

    strict: bool = False
    engine: EngineName = "rapidocr"
    lang: str | None = None
    normalize: bool = False
    parallel: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "ocr_strict" if self.strict else "ocr"

    @property
    def version(self) -> str:
        """Rule and engine: the package pins its models. UserError if it is not installed."""
        rule = "rule 2, normalized" if self.normalize else "rule 2"
        return fingerprint(rule, self.name, *identity(self.engine, self.lang))

    def check(self, prompts: Sequence[Prompt]) -> None:
        if self.lang is not None and self.engine == "rapidocr":
            raise UserError(
                f'reward "{self.name}": lang is "{self.lang}" with the engine rapidocr, whose one model reads Chinese, '
                "English and Japanese; expected none, or the engine paddleocr"
            )
        for prompt in prompts:
            try:
                target_of(prompt)
            except UserError as error:
                raise UserError(f'reward "{self.name}": prompt "{prompt.id}": {error}') from None
        try:
            prepare(self.engine, self.lang)
        except UserError as error:
            raise UserError(f'reward "{self.name}": {error}') from error

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        targets = [target_of(prompt) for prompt in prompts]
        if len(images) != len(targets):
            raise ValueError(f"{len(images)} images came with {len(targets)} prompts")
        threads = environment.threads() or os.cpu_count() or 1
        with ThreadPoolExecutor(max(1, min(threads, len(images)))) as pool:
            evidence = list(pool.map(lambda i: read(i, images[i], self.engine, self.lang), range(len(images))))
        scores = [
            ocr_score(found["text"], target, strict=self.strict, normalize=self.normalize)
            for found, target in zip(evidence, targets, strict=True)
        ]
        return Scores(np.asarray(scores, np.float64), evidence)


def ocr(*, engine: EngineName = "rapidocr", lang: str | None = None, normalize: bool = False) -> OcrReward:
    """The published rule. `lang` is PaddleOCR's ("en"; "ch" reads Chinese and English)."""
    return OcrReward(engine=engine, lang=lang, normalize=normalize)


def ocr_strict(*, engine: EngineName = "rapidocr", lang: str | None = None, normalize: bool = False) -> OcrReward:
    """The same without the substring rule: text around the target costs."""
    return OcrReward(strict=True, engine=engine, lang=lang, normalize=normalize)
